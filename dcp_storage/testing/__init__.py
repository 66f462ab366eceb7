"""For tests of stores, and of programs that must survive a store's failures. It needs pytest."""

import pytest

pytest.register_assert_rewrite("dcp_storage.testing.commits", "dcp_storage.testing.suite")
