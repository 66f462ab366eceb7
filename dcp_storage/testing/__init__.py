"""Tools to test stores, and programs that must survive a store's failures. They need pytest."""

import pytest

pytest.register_assert_rewrite("dcp_storage.testing.commits", "dcp_storage.testing.suite")
