"""The demo from beginning to end: load, train, save, die, resume, verify."""

import time
from collections.abc import Sequence
from statistics import median

from integration.demo import report
from integration.demo.figures import CONTESTANTS, OURS, Config, Results, Resume
from integration.demo.ranks import Event, Ranks
from integration.demo.report import ranks_text
from integration.demo.screen import Screen
from integration.demo.tasks import orders, resume_and_verify, train_and_save

KILL_AT = 0.3
"""When the ranks are killed, as a share of the time that our save took before; it takes longer beside training."""


class Story:
    """Collects figures while the ranks work, and tells of them."""

    def __init__(self, config: Config, results: Results, screen: Screen) -> None:
        self._config, self._results, self._screen = config, results, screen

    def play(self, resume_ranks: Sequence[int]) -> None:
        """Play every chapter; figures and failures are in the results afterwards."""
        transfers = len(list(orders())) * len(CONTESTANTS)
        self._screen.expect(2 + self._config.steps + transfers + len(resume_ranks) * (transfers + 1))
        self._train_save_and_die()
        for count in resume_ranks:
            self._resume(count)

    def _train_save_and_die(self) -> None:
        with Ranks(self._results.ranks, train_and_save, self._config) as ranks:
            for event in ranks.events():
                self._collect(event)
                if event.name == "second-save":
                    self._kill(ranks)
        self._screen.advance("Killed")
        self._screen.tell("Die", report.kill_text(self._results, self._config.steps))

    def _collect(self, event: Event) -> None:
        results, data = self._results, event.data
        match event.name:
            case "weights":
                results.weights = data
                self._screen.tell("Load", report.weights_text(data))
                self._screen.advance(f"Training on {ranks_text(results.ranks)}")
            case "trained":
                results.losses.append(data)
                self._screen.advance(f"Training on {ranks_text(results.ranks)}: loss {data:.2f}")
            case "evaluated":
                self._on_evaluated(*data)
            case "saved":
                results.save_s.setdefault(data[0], []).append(data[1])
                self._screen.advance(f"Saving with {report.LABELS[data[0]]}")
            case "stored":
                results.parts = data
                self._screen.tell("Save", report.save_text(results))
            case "second-save-finished":
                results.second_save_finished = True

    def _on_evaluated(self, step: int, loss: float) -> None:
        if not self._results.evaluated:
            self._screen.tell("Train", report.train_text(self._results))
        self._results.evaluated[step] = loss

    def _kill(self, ranks: Ranks) -> None:
        self._results.killed_after_s = KILL_AT * median(self._results.save_s[OURS])
        time.sleep(self._results.killed_after_s)
        ranks.kill()

    def _resume(self, count: int) -> None:
        resume = Resume(count)
        self._results.resumes.append(resume)
        with Ranks(count, resume_and_verify, self._config) as ranks:
            for event in ranks.events():
                self._collect_resume(resume, event)
        self._screen.advance("Resumed")
        self._screen.tell("Resume", report.resume_text(resume, self._results))

    def _collect_resume(self, resume: Resume, event: Event) -> None:
        match event.name:
            case "loaded":
                resume.load_s.setdefault(event.data[0], []).append(event.data[1])
                self._screen.advance(f"Loading on {ranks_text(resume.ranks)}")
            case "checked":
                resume.checks[event.data[0]] = event.data[1]
            case "resumed":
                resume.loss, resume.next_loss = event.data
