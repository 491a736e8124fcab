"""Deliberate breaks: each is applied to a copy of the library, and the tests of its promise must notice.

    python -m tests.breaks             all of them, two at a time
    python -m tests.breaks NAME…       some
    python -m tests.breaks --list

It is an error if a break's text does not stand exactly once in the source, for the list follows the code; if its tests
pass all the same; and if they fail on an unbroken copy.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN_SECONDS = 120.0
UNBROKEN_SECONDS = 2000.0  # for half of all tests, on a busy machine
SINGLE = "test_postgres_as_single.py::test_P2_P4_what_a_batch_writes_is_what_single_inserts_write"


@dataclass(frozen=True)
class Break:
    """In *file* each old text becomes the new one; then one of *tests* must fail, or take more than *seconds*."""

    name: str
    promise: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    seconds: int = 20


BREAKS = (
    Break(
        "a wait below the batcher's own code waits",
        "P5",
        "core.py",
        (
            (
                "        if self.must_not_wait():\n            raise RuntimeError(",
                "        if False:\n            raise RuntimeError(",
            ),
        ),
        ("test_handlers.py::test_P5_a_wait_below_the_batchers_own_code_is_refused_at_once",),
    ),
    Break(
        "a handler's wait looks at the batcher's own lock alone",
        "P5",
        "core.py",
        (("            or holds_condition()\n", ""), ("            or births()._is_owned()\n", "")),
        ("test_handlers.py::test_P5_a_wait_below_the_batchers_own_code_is_refused_at_once",),
        seconds=6,
    ),
    Break(
        "a shutdown below the batcher's own code waits",
        "P6",
        "batcher.py",
        (("        if core.must_not_wait():\n", "        if False:\n"),),
        ("test_handlers.py::test_P6_a_shutdown_below_the_batchers_own_code_begins_and_does_not_wait",),
        seconds=6,
    ),
    Break(
        "a cancel below the batcher's own code calls callbacks there",
        "P1",
        "core.py",
        (
            (
                "            if self.must_not_wait():\n                # Neither",
                "            if False:\n                # Neither",
            ),
        ),
        ("test_handlers.py::test_what_does_not_wait_goes_on_below_the_batchers_own_code",),
    ),
    Break(
        "an acceptance overlooks what a handler has closed",
        "P6",
        "acceptance.py",
        (("                if not core.closed:\n", "                if True:\n"),),
        ("test_handlers.py::test_P6_what_a_handler_closes_in_the_middle_of_a_submit_accepts_nothing_more",),
    ),
    Break(
        "a fork takes no locks",
        "P7",
        "core.py",
        (("    _taken.append(take_all([births(), *(core.lock for core in living_cores())]))\n", "    pass\n"),),
        ("test_handlers.py::test_P7_a_fork_between_the_look_at_the_lock_and_its_entering",),
        seconds=10,
    ),
    Break(
        "an acceptance that goes on in a child starts no threads",
        "P7",
        "core.py",
        (
            (
                "            self.ring_supervisor()\n        self.replace_dead()\n",
                "            self.ring_supervisor()\n",
            ),
        ),
        ("test_handlers.py::test_P7_a_fork_in_the_middle_of_an_acceptance",),
    ),
    Break(
        "a job that goes on in a child stays in the parent's queue",
        "P7",
        "core.py",
        (
            (
                "self.intake.rebuild(lambda: list(self.outstanding.values()))\n            self.ring_worker()\n",
                "self.ring_worker()\n",
            ),
        ),
        ("test_handlers.py::test_P7_a_fork_in_the_middle_of_an_acceptance",),
    ),
    Break(
        "a main thread that waits sleeps on in a child",
        "P7",
        "job.py",
        (
            (
                "                waiter.finished_futures.append(self)\n            waiter.event.set()\n",
                "                pass\n",
            ),
        ),
        ("test_handlers.py::test_P7_a_main_thread_that_waits_when_its_handler_forks_is_woken_in_the_child",),
        seconds=15,
    ),
    Break(
        "the start of a thread is waited for in a child where there is none",
        "P7",
        "interpreter.py",
        (
            (
                "    def _at_fork_reinit(self) -> None:\n        super().set()\n",
                "    def _at_fork_reinit(self) -> None:\n        pass\n",
            ),
        ),
        ("test_handlers.py::test_P7_a_child_that_a_signal_handler_forks_goes_on_with_what_it_was_at",),
        seconds=15,
    ),
    Break(
        "a job that begins overwrites a future that is done",
        "P1",
        "job.py",
        (
            (
                "        if future._state is PENDING:\n            future._state",
                "        if True:\n            future._state",
            ),
        ),
        ("test_ended_by_its_holder.py::test_P1_a_future_that_its_holder_has_ended_says_nothing_else_later",),
    ),
    Break(
        "a flush waits for futures alone",
        "P1",
        "life.py",
        (("        while job.verdict is None:\n", "        while False:\n"),),
        ("test_ended_by_its_holder.py::test_flush_waits_for_the_job_and_not_for_its_future_alone",),
    ),
    Break(
        "an id's new job is forgotten with its old one",
        "API",
        "registry.py",
        (("        if self.live.get(job_id) is future:\n", "        if job_id in self.live:\n"),),
        ("test_ended_by_its_holder.py::test_an_id_is_free_once_the_future_says_failed_and_stays_with_the_new_job",),
    ),
    Break(
        "a copy of an exception is written to as it likes",
        "P3",
        "foreign.py",
        (
            (
                "        _own[name].__set__(twin, _get(name, error))\n",
                "        setattr(twin, name, getattr(error, name))\n",
            ),
        ),
        ("test_foreign.py::test_P3_a_strangers_exception_that_is_returned_fails_its_own_jobs_alone",),
    ),
    Break(
        "a failed job's exception is asked for a batch as it likes",
        "P1",
        "foreign.py",
        (
            (
                "    try:\n        return getattr(value, name, None)\n    except BaseException:\n        return None\n",
                "    return getattr(value, name, None)\n",
            ),
            ('attribute(error, "batch_id") if is_unknown(error) else None', 'attribute(error, "batch_id")'),
        ),
        ("test_foreign.py::test_P1_a_strangers_exception_that_is_raised_reaches_every_job_of_its_batch",),
    ),
    Break(
        "an exception is what it says it is",
        "P3",
        "foreign.py",
        (("    return issubclass(type(error), OutcomeUnknown)\n", "    return isinstance(error, OutcomeUnknown)\n"),),
        ("test_foreign.py::test_P3_a_strangers_exception_that_is_returned_fails_its_own_jobs_alone",),
    ),
    Break(
        "what cannot be told is told for ever",
        "P1",
        "owed.py",
        (("        if begun <= _ATTEMPTS:\n            return True\n", "        return True\n"),),
        ("test_foreign.py::test_P1_an_event_that_cannot_be_told_is_tried_and_dropped",),
    ),
    Break(
        "a thread that dies at once is replaced at once",
        "P1",
        "core.py",
        (("        over = self.count - _FREE_SETBACKS\n", "        over = 0\n"),),
        ("test_foreign.py::test_P1_what_kills_every_worker_at_once_does_not_keep_a_processor_busy",),
    ),
    Break(
        "no pid check",
        "P7",
        "core.py",
        (("if not self.here[0]:\n            with _fork_lock", "if False:\n            with _fork_lock"),),
        ("test_fork.py::test_P7_inherited_futures_are_unknown_in_the_child[queued-no hooks]",),
    ),
    Break(
        "no fork hook and no pid check",
        "P7",
        "core.py",
        (
            ("if not self.here[0]:\n            with _fork_lock", "if False:\n            with _fork_lock"),
            ('if hasattr(os, "register_at_fork"):', "if False:"),
        ),
        ("test_fork.py::test_P7_inherited_futures_are_unknown_in_the_child[queued-hooks]",),
        seconds=6,
    ),
    Break(
        "a core that is at rest holds the processor",
        "P6",
        "core.py",
        (("            self.pinned = None\n", "            pass\n"),),
        ("test_belongings.py::test_P6_a_forgotten_batcher_ends_although_what_it_was_given_leads_back_to_it[plain]",),
        seconds=30,
    ),
    Break(
        "a forgotten batcher does not close its processor",
        "P6",
        "core.py",
        (
            (
                "        with self.lock:\n            self.pinned = belongings\n",
                "        with self.lock:\n            pass\n",
            ),
        ),
        ("test_belongings.py::test_P6_a_forgotten_batcher_ends_although_what_it_was_given_leads_back_to_it[plain]",),
        seconds=30,
    ),
    Break(
        "a child counts its jobs from the beginning again",
        "P7",
        "core.py",
        (
            (
                "        self.outstanding: dict[int, Job] = {}\n",
                "        self.outstanding: dict[int, Job] = {}\n        self.sequence = itertools.count(1)\n",
            ),
        ),
        ("test_batcher.py::test_P7_an_inherited_future_has_no_hold_on_the_jobs_of_the_child",),
    ),
    Break(
        "a flag tested before the put",
        "P6",
        "acceptance.py",
        (
            (
                "    with core.lock:\n        if core.closed:\n            raise refuse_closed(core, 1)\n"
                "        if job_id is not None:\n            taken",
                "    if core.closed:\n        raise refuse_closed(core, 1)\n"
                "    __import__('os').sched_yield()\n"
                "    with core.lock:\n        if job_id is not None:\n            taken",
            ),
        ),
        ("test_batcher.py::test_P6_no_submit_slips_past_the_end_of_a_shutdown",),
    ),
    Break(
        "except Exception round the processor",
        "P1",
        "calling.py",
        (
            (
                "        answer.extend(map(process, (batch,)))\n    except BaseException",
                "        answer.extend(map(process, (batch,)))\n    except Exception",
            ),
        ),
        ("test_threads.py::test_p1_whatever_the_processor_raises_fails_its_batch_and_not_the_worker[SystemExit]",),
    ),
    Break(
        "results in another order than the jobs",
        "P2",
        "judge.py",
        (
            (
                "return [(COMPLETED, value, None) for value in values], 0, None",
                "return [(COMPLETED, value, None) for value in values[::-1]], 0, None",
            ),
        ),
        ("test_judge.py::test_P2_results_belong_to_the_jobs_in_their_order",),
    ),
    Break(
        "results tied to the jobs that are left instead of to their places",
        "P2",
        "worker.py",
        (
            ("outcome = self._process(collected)", "outcome = self._process(collected)\n        self._drop()"),
            (
                "    # Collecting: one",
                "    def _drop(self) -> None:\n"
                "        self.jobs.sort(key=lambda job: job.verdict is not None)\n\n"
                "    # Collecting: one",
            ),
        ),
        ("test_supervisor.py::test_P5_the_others_of_a_batch_get_their_results_though_one_is_overdue",),
    ),
    Break(
        "no count check",
        "P2",
        "judge.py",
        (
            ("if len(values) != len(jobs):", "if False:"),
            ("for value in values], 0, None", "for value in (*values, *[None] * len(jobs))[: len(jobs)]], 0, None"),
        ),
        ("test_judge.py::test_P2_any_other_answer_makes_every_job_unknown",),
    ),
    Break(
        "a broken contract as a plain failure",
        "P2",
        "judge.py",
        (
            ("            error = ProcessorContractError(\n", "            error = _Plain(\n"),
            (
                "class Again:",
                "class _Plain(ValueError):\n"
                "    def __init__(self, text: str, batch_id: str) -> None: ...\n\n\nclass Again:",
            ),
        ),
        ("test_judge.py::test_P2_any_other_answer_makes_every_job_unknown",),
    ),
    Break(
        "sleeping in the retry",
        "P5",
        "flight.py",
        (
            (
                "        self._report(batch, outcome, retried)\n",
                "        self._report(batch, outcome, retried)\n"
                "        if retried:\n            __import__('time').sleep(retried[0][2])\n",
            ),
        ),
        ("test_batcher.py::test_P5_a_retry_does_not_hold_up_its_neighbours",),
    ),
    Break(
        "a line in the log before the futures",
        "P1",
        "flight.py",
        (
            (
                "            core.after_ends()\n        return retried\n",
                "            core.after_ends()\n"
                "        self._report(batch, outcome, retried)\n        return retried\n",
            ),
        ),
        ("test_threads.py::test_P1_a_log_handler_that_blocks_holds_up_no_future",),
    ),
    Break(
        "skipping set_running_or_notify_cancel",
        "P1",
        "telling.py",
        (("        return job.future._conclude(CANCELLED_AND_NOTIFIED, None, None, blocking)", "        return True"),),
        ("test_batcher.py::test_P1_a_cancelled_job_is_done_for_who_waits_for_several",),
    ),
    Break(
        "what closes a forgotten batcher holds it",
        "P5",
        "batcher.py",
        (("_close, weakref.ref(core), weakref.ref(self._belongings))", "core.close)"),),
        ("test_batcher.py::test_P5_a_batcher_whose_listener_holds_it_is_collected_after_its_shutdown",),
        seconds=8,
    ),
    Break(
        "every failed attempt of an outage is a warning",
        "log",
        "outage.py",
        (("        first = self._since is None\n", "        first = True\n"),),
        ("test_outage.py::test_an_outage_is_one_line_when_it_begins_and_one_when_it_is_over",),
    ),
    Break(
        "the text of any error is in the log",
        "log",
        "outage.py",
        (("    return text if type(text) is str else type_name(error)", "    return str(error)"),),
        ("test_outage.py::test_an_outage_is_one_line_when_it_begins_and_one_when_it_is_over",),
    ),
    Break(
        "map reads all of its jobs first",
        "P5",
        "mapping.py",
        (("len(ahead) >= window or ahead[0].done()", "False"),),
        ("test_mapping.py::test_no_more_is_read_than_a_few_batches_ahead",),
    ),
    Break(
        "a shutdown waits for jobs without a deadline as long as they are tried",
        "P5",
        "life.py",
        (("or NEVER not in deadlines:", "or deadlines is not None:"),),
        ("test_batcher.py::test_P5_a_stuck_processor_does_not_hold_a_shutdown_without_deadlines",),
    ),
    Break(
        "a plain lock",
        "P1",
        "core.py",
        (
            (
                "        self.lock = threading.RLock()\n",
                "        self.lock = type('Plain', (), {'_is_owned': lambda s: False,"
                " '__init__': lambda s: setattr(s, 'l', threading.Lock()), '__enter__': lambda s: s.l.acquire(),"
                " '__exit__': lambda s, *a: s.l.release()})()\n",
            ),
        ),
        ("test_batcher.py::test_P1_a_submit_in_the_middle_of_a_submit_is_accepted",),
        seconds=6,
    ),
    Break(
        "forgetting the heap at shutdown",
        "P6",
        "worker.py",
        (
            (
                "elif not wait or (core.closed and not core.outstanding):",
                "elif not wait or (core.closed and not core.intake.store.size()):",
            ),
        ),
        ("test_batcher.py::test_P6_shutdown_waits_for_retries_also_with_threads",),
        seconds=6,
    ),
    Break(
        "acceptance before the wake-up",
        "P1",
        "acceptance.py",
        (
            (
                "            # Wake-ups first, acceptance last",
                "            core.outstanding[sequence] = job\n            # Wake-ups first, acceptance last",
            ),
        ),
        (
            "test_batcher.py::test_P1_a_submit_that_is_interrupted_anywhere_leaves_no_accepted_job_asleep"
            "_and_no_other_one_to_be_done",
        ),
    ),
    Break(
        "what is queued is done, accepted or not",
        "P1",
        "collector.py",
        (("if job.sequence in outstanding and job.place == QUEUED", "if job.place == QUEUED"),),
        (
            "test_collector.py::test_P1_what_is_queued_and_was_never_accepted_is_skipped",
            "test_queues.py::test_P1_a_foreign_queue_that_fills_up_in_the_middle_takes_none_and_doubles_none",
        ),
    ),
    Break(
        "the bound counts only what is queued",
        "P5",
        "acceptance.py",
        (("if len(core.outstanding) < core.bound:", "if core.intake.store.size() < core.bound:"),),
        ("test_batcher.py::test_P5_queued_running_and_waiting_jobs_all_count",),
    ),
    Break(
        "a late result overwrites the outcome",
        "P5",
        "core.py",
        (
            (
                "            if job.verdict is None:\n                # Uninterrupted, as in `end`.",
                "            if True:\n                # Uninterrupted, as in `end`.",
            ),
            (
                "                del outstanding[job.sequence]\n                if job.future",
                "                outstanding.pop(job.sequence, None)\n                if job.future",
            ),
        ),
        (
            "test_supervisor.py::test_P5_a_job_that_the_processor_still_holds_is_unknown_at_its_deadline"
            "_and_its_late_answer_is_dropped",
        ),
    ),
    Break(
        "no supervision of deadlines",
        "P5",
        "owed.py",
        (
            (
                "    ended = [job for job in jobs if job.deadline <= now and job.verdict is None]",
                "    ended: list[Job] = []",
            ),
        ),
        ("test_supervisor.py::test_P5_a_job_that_was_never_handed_over_fails_at_its_deadline",),
        seconds=6,
    ),
    Break(
        "a deadline that passes in the processor is called a failure",
        "P4",
        "owed.py",
        (
            (
                "    if job.place == HANDED_OVER:\n        return Out",
                "    if False:\n        return Out",
            ),
        ),
        (
            "test_supervisor.py::test_P5_a_job_that_the_processor_still_holds_is_unknown_at_its_deadline"
            "_and_its_late_answer_is_dropped",
        ),
    ),
    Break(
        "one exception instance for all",
        "P1",
        "judge.py",
        (("        yield copied(error)\n", "        yield error\n"),),
        ("test_judge.py::test_a_batch_that_raised_fails_each_job_with_an_error_of_its_own",),
    ),
    Break(
        "callbacks that raise SystemExit pass",
        "P1",
        "job.py",
        (
            (
                '                except BaseException:\n                    _log.exception("exception calling',
                '                except Exception:\n                    _log.exception("exception calling',
            ),
        ),
        ("test_batcher.py::test_P1_what_listeners_and_callbacks_raise_changes_nothing[SystemExit]",),
    ),
    Break(
        "listeners that raise SystemExit pass",
        "P1",
        "events.py",
        (("            except BaseException:\n", "            except Exception:\n"),),
        ("test_events.py::test_a_listener_that_raises_is_logged_and_changes_nothing",),
    ),
    Break(
        "a history without bound",
        "P5",
        "registry.py",
        (
            ("while len(self._finished) > self._history:", "while False:"),
            ("            if expires > now:\n", "            if True:\n"),
        ),
        ("test_registry.py::test_the_history_is_bounded_and_the_oldest_leave_first",),
    ),
    Break(
        "submit waits on the worker",
        "P6",
        "acceptance.py",
        ((" and not hopeless", ""),),
        ("test_batcher.py::test_a_submit_on_a_worker_never_waits_for_it",),
        seconds=6,
    ),
    Break(
        "an unknown outcome is retried by retry_on",
        "P4",
        "judge.py",
        (
            (
                "if self._retry is None or is_unknown(error) or not is_ordinary(error):",
                "if self._retry is None or not is_ordinary(error):",
            ),
        ),
        ("test_judge.py::test_P4_retry_on_does_not_cover_an_unknown_outcome",),
    ),
    Break(
        "an undecided batch comes back in pieces",
        "P4",
        "flight.py",
        (("groups = {} if outcome.error is None else self._groups(batch, outcome.answers)", "groups = {}"),),
        ("test_threads.py::test_p4_an_undecided_batch_comes_back_unchanged_alone_with_its_id",),
    ),
    Break(
        "a batch goes into one command, however large it is",
        "P3",
        "processors/postgres/values.py",
        (("return size > _LARGEST", "return False"),),
        ("test_postgres_large.py::test_no_command_is_larger_than_it_may_be",),
    ),
    Break(
        "a job that no message carries is sent again and again",
        "P3",
        "processors/postgres/transaction.py",
        (("self._way.size(i) > _MESSAGE", "False"),),
        ("test_postgres_large.py::test_P3_a_job_that_no_message_carries_says_so_and_fails_alone",),
    ),
    Break(
        "a batch that was committed on another server alone is written again",
        "P4",
        "processors/postgres/guard.py",
        (("    if token.servers:\n        reason", "    if False:\n        reason"),),
        (
            "test_postgres_elsewhere.py::test_P4_a_commit_that_was_carried_out_elsewhere_alone_is_unknown_and_not_repeated",
        ),
        40,
    ),
    Break(
        "keys are drawn for a table whose triggers may write to another server",
        "P4",
        "processors/postgres/plan.py",
        (("if table.may_reach_elsewhere:", "if False:"),),
        (
            "test_postgres_elsewhere.py::test_P4_a_commit_that_was_carried_out_elsewhere_alone_is_unknown_and_not_repeated",
        ),
        40,
    ),
    Break(
        "a part of a batch comes back with jobs that have expired",
        "P4",
        "collector.py",
        (("        if not self.left_nothing:\n            return self.jobs\n", "        return self.jobs\n"),),
        ("test_collector.py::test_P4_a_part_that_left_nothing_comes_back_alone_without_those_that_ended",),
    ),
    Break(
        "a batch that breaks its link is never split",
        "P3",
        "processors/postgres/splitting.py",
        (("return self._isolates and len(batch) > 1", "return False"),),
        ("test_postgres_splitting.py::test_P3_a_job_that_breaks_its_link_fails_alone[statement-own]",),
    ),
    Break(
        "a batch with drawn keys that broke its link is only sent again",
        "P3",
        "processors/postgres/keyed.py",
        (("return retry.look() if only_look and retry.can_look() else retry.run()", "return retry.run()"),),
        ("test_postgres_splitting.py::test_P3_a_job_that_breaks_its_link_fails_alone[keys-own]",),
        40,
    ),
    Break(
        "a job that is alone by now is given up like a batch is split",
        "P4",
        "processors/postgres/splitting.py",
        (("may = _ALONE if not self._splits(batch) else ", "may = "),),
        ("test_postgres_splitting.py::test_P4_a_job_that_is_alone_since_the_others_ended_is_as_patient_as_any",),
        40,
    ),
    Break(
        "a crash of another process is held against a job",
        "P4",
        "processors/postgres/splitting.py",
        (("notice.sqlstate in _INNOCENT", "False"),),
        (
            "test_postgres_splitting.py"
            "::test_P4_a_job_alone_is_not_blamed_for_a_server_that_goes_down_under_it[crash-statement]",
        ),
        60,
    ),
    Break(
        "a restart of the server is held against a job",
        "P4",
        "processors/postgres/splitting.py",
        (("                suspect.excuse()\n", "                pass\n"),),
        (
            "test_postgres_splitting.py"
            "::test_P4_a_job_alone_is_not_blamed_for_a_server_that_goes_down_under_it[fast-statement]",
        ),
        60,
    ),
    Break(
        "an undecided batch that a dead worker had taken comes back in pieces",
        "P4",
        "flight.py",
        (("job.place = QUEUED if job.undecided is None else WAITING", "job.place = QUEUED"),),
        ("test_supervisor.py::test_P4_an_undecided_batch_that_a_dead_worker_had_taken_comes_back_as_the_same_batch",),
    ),
    Break(
        "an undecided batch is decided by a processor that cannot be opened",
        "P4",
        "worker.py",
        (
            (
                "        if undecided is None or undecided.left_nothing:\n            return error\n",
                "        return error\n",
            ),
        ),
        ("test_threads.py::test_p4_a_failing_open_leaves_an_undecided_batch_undecided",),
    ),
    Break(
        "no exit hooks",
        "P6",
        "life.py",
        (("call_before_threads_end(_flush_before_threads_end)\natexit.register(_close_at_exit)\n", ""),),
        ("test_exit.py::test_P6_everything_accepted_is_drained_at_exit[returns-queued]",),
    ),
    Break(
        "no early exit hook",
        "P6",
        "life.py",
        (("call_before_threads_end(_flush_before_threads_end)\n", ""),),
        ("test_fork.py::test_P6_multiprocessing_children_drain_before_they_end[fork-work]",),
    ),
    Break(
        "a dead worker is not noticed",
        "P1",
        "supervisor.py",
        (("if worker.gone]", "if False]"),),
        ("test_supervisor.py::test_P1_what_a_dead_worker_had_not_handed_over_is_done_by_the_next_one",),
    ),
    Break(
        "a dead worker keeps its jobs",
        "P1",
        "flight.py",
        (("if job.verdict is None and job.place == HANDED_OVER:", "if False:"),),
        (
            "test_supervisor.py::test_P1_what_a_dead_worker_held_is_unknown_what_it_only_took_is_queued_again"
            "_and_another_takes_its_place",
        ),
    ),
    Break(
        "a dead worker tells what the supervisor has told",
        "P1",
        "flight.py",
        (("(id(job.verdict) in own or type(job.verdict[2]) is WorkerDied)", "True"),),
        ("test_supervisor.py::test_what_expired_while_a_worker_held_it_is_told_once_though_the_worker_dies",),
    ),
    Break(
        "priority is ignored",
        "API",
        "queues.py",
        (('priority = getattr(item, "priority", 0)', "priority = 0"),),
        ("test_queues.py::test_memory_queue_is_a_stable_sort_by_priority_whatever_goes_in_and_out",),
    ),
    Break(
        "a foreign queue doubles a job",
        "P4",
        "collector.py",
        (("        if intake.doubles:\n", "        if False:\n"),),
        ("test_queues.py::test_P4_a_queue_that_gives_too_much_and_twice_doubles_no_job_and_overfills_no_batch",),
    ),
    Break(
        "linger counts from the newest job",
        "P8",
        "collector.py",
        (
            (
                "        until = min(lingers_until(job, linger) for job in intake.open)",
                "        until = max(lingers_until(job, linger) for job in intake.open)",
            ),
            ('    return "linger" if min(', '    return "linger" if max('),
        ),
        ("test_collector.py::test_linger_counts_from_the_oldest_job",),
    ),
    Break(
        "a job lingers past its deadline",
        "P5",
        "collector.py",
        (
            (
                "    return min(job.submitted + linger, (job.submitted + job.deadline) / 2)",
                "    return job.submitted + linger",
            ),
        ),
        ("test_collector.py::test_P5_a_job_lingers_for_half_of_its_time_at_most",),
    ),
    Break(
        "a worker that lingers is not woken by a job with less time",
        "P5",
        "acceptance.py",
        ((" or job.deadline < core.wake_before:", ":"),),
        ("test_threads.py::test_P5_a_job_with_less_time_than_the_linger_is_taken_before_its_deadline",),
    ),
    Break(
        "what waits for the threads of a child is started where a Ctrl-C arrives",
        "P6",
        "life.py",
        (
            ("target=_start_joiner, args=(started,), name", "target=_join_and_close, name"),
            ('name="microbatch-exit", daemon=True', 'name="microbatch-exit", daemon=False'),
            ("        started.take(CLOSE_SECONDS)\n", ""),
        ),
        ("test_worker_faults.py::test_P6_the_end_of_a_multiprocessing_child_is_interrupted_anywhere",),
        seconds=60,
    ),
    Break(
        "a shutdown looks at its timeout only when nobody wakes it",
        "P6",
        "life.py",
        (
            (
                "while not core.finished and (left := give_up - time.monotonic()) > 0:",
                "while not core.finished and (left := max(0.0, give_up - time.monotonic())) >= 0:",
            ),
        ),
        ("test_threads.py::test_P6_a_shutdown_that_is_woken_all_the_time_ends_within_its_timeout",),
        seconds=40,
    ),
    Break(
        "a dying supervisor leaves its place to whoever comes",
        "P5",
        "supervisor.py",
        (("        if core.short and (core.outstanding or core.owed):\n", "        if False:\n"),),
        ("test_threads.py::test_P5_deadlines_are_kept_where_the_supervisor_dies_while_the_worker_is_held",),
        seconds=30,
    ),
    Break(
        "the last event does not wait for a cancel",
        "P6",
        "supervisor.py",
        (("core.owed or core.cancelling or core.unclosed()", "core.owed or core.unclosed()"),),
        ("test_threads.py::test_P6_a_cancel_tells_its_event_before_the_last_one[False]",),
    ),
    Break(
        "the last event waits for a cancel that waits for it",
        "P6",
        "life.py",
        (("    core.forget_own_cancels()\n", ""),),
        ("test_threads.py::test_P6_a_cancel_tells_its_event_before_the_last_one[True]",),
    ),
    Break(
        "a lone job waits",
        "P8",
        "collector.py",
        (
            ("    if not linger:\n", "    if not linger and len(jobs) > 1:\n"),
            ('    return "linger" if', '    linger = linger or 0.2\n    return "linger" if'),
        ),
        ("test_collector.py::test_P8_a_lone_job_is_taken_at_once",),
    ),
    Break(
        "callers who come back are taken one by one",
        "P8",
        "worker.py",
        (("returning=None if core.blocked else core.returning", "returning=None"),),
        ("test_threads.py::test_callers_who_come_back_at_once_go_together",),
    ),
    Break(
        "a lone caller is waited for",
        "P8",
        "returning.py",
        (("if callers < 1 or callers + backlog < 2 or", "if callers < 1 or"),),
        ("test_collector.py::test_P8_nobody_waits_for_a_caller_who_is_alone_nor_for_nobody",),
    ),
    Break(
        "flush does not wait for the futures",
        "P5",
        "core.py",
        (("            return self.unresolved()\n", "            return []\n"),),
        ("test_batcher.py::test_P5_flush_gives_up_at_its_timeout_and_the_jobs_go_on",),
    ),
    Break(
        "a sleep that is over before it begins lasts for ever, as a SimpleQueue's",
        "P5",
        "interpreter.py",
        (("acquire(timeout=max(seconds, 0.0))", "acquire(timeout=seconds if seconds > 1e-6 else -1)"),),
        ("test_interpreter.py::test_who_waits_for_a_token_wakes_in_time_however_short_it_is",),
    ),
    Break(
        "a blocked submit is forgotten at shutdown",
        "P6",
        "core.py",
        (("self.blocked.popleft()[1].put()", "self.blocked.popleft()"),),
        ("test_batcher.py::test_P6_a_blocked_submit_is_refused_when_shutdown_begins",),
        seconds=6,
    ),
    Break(
        "a shutdown tells its last event before the others",
        "P6",
        "supervisor.py",
        (("if busy and now < self._close_by:", "if False:"),),
        ("test_batcher.py::test_P6_the_last_event_is_the_last",),
    ),
    Break(
        "the model: the outcome is counted when it is told",
        "P1",
        "core.py",
        (("        counters.failed += status is FAILED\n", "        counters.failed += status is not COMPLETED\n"),),
        ("test_model.py::TestInlineModel",),
    ),
    Break(
        "keys drawn without a flush",
        "P4",
        "processors/postgres/keys.py",
        (
            (" pg_logical_emit_message(true, 'microbatch', '')", " 1"),
            (
                "set_config('synchronous_commit', coalesce(nullif(current_setting('synchronous_commit'), 'off'),"
                " 'local'), true),",
                "1,",
            ),
        ),
        ("test_postgres_bulk.py::test_P4_keys_survive_a_crash_that_strangers_profit_from",),
    ),
    Break(
        "a key that a stranger took is the job's fault",
        "P3",
        "processors/postgres/keyed.py",
        (("        else:\n            raise KeysTaken(_TAKEN)\n", ""),),
        ("test_postgres_bulk.py::test_P3_keys_that_are_taken_by_the_thousand_are_no_jobs_fault",),
    ),
    Break(
        "an undecided batch is written anew",
        "P4",
        "processors/postgres/settling.py",
        (("return self._pending.get(batch.id)", "return None"),),
        ("test_postgres_bulk.py::test_P4_a_committed_batch_whose_answer_is_lost_is_found_by_its_keys",),
    ),
    Break(
        "a retry commits what is missing",
        "P4",
        "processors/postgres/keyed.py",
        (("if len(results) == len(self._positions):", "if results:"),),
        ("test_postgres_bulk.py::test_P4_rows_deleted_in_between_do_not_come_back",),
    ),
    Break(
        "found keys are ours, whatever the rows hold",
        "P4",
        "processors/postgres/keyed.py",
        (("if all_there or self._keyed.may_change or self._count_own():", "if True:"),),
        ("test_postgres_keys.py::test_P4_a_stranger_who_takes_a_key_by_hand_is_never_taken_for_us",),
    ),
    Break(
        "numbers are drawn although the row asks for its own",
        "P2",
        "processors/postgres/plan.py",
        (("or table.notice.of_drawing()", ""),),
        (f"{SINGLE}[a default reads currval-no fault]",),
    ),
    Break(
        "triggers that ask for the number of their row see a batch",
        "P2",
        "processors/postgres/plan.py",
        (("return table.notice.of_batches()", 'return ""'),),
        (f"{SINGLE}[a trigger reads currval-no fault]",),
    ),
    Break(
        "rows that their trigger takes away are looked for",
        "P4",
        "processors/postgres/notice.py",
        (("        if self.taker:\n", "        if False:\n"),),
        (f"{SINGLE}[a trigger takes its row away-answer lost]",),
    ),
    Break(
        "a reader that is not called directly is not looked for",
        "P2",
        "processors/postgres/notice.py",
        (("'reader', (SELECT min(name) FROM readers)", "'reader', NULL::text"),),
        (f"{SINGLE}[a trigger writes where a default reads currval-no fault]",),
    ),
    Break(
        "whatever a sequence is a part of is drawn from it",
        "P2",
        "processors/postgres/catalogue.py",
        (("is_next = bool(self.identity) or self._defaults_to(_NEXT_NUMBER)", "is_next = True"),),
        (f"{SINGLE}[every other number-no fault]",),
    ),
    Break(
        "columns beside the key are taken for a part of it",
        "P4",
        "processors/postgres/catalogue.py",
        (
            (
                "(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)) ORDER",
                "(a.attnum = ANY (i.indkey), false)) ORDER",
            ),
        ),
        (f"{SINGLE}[columns beside the key-answer lost]",),
    ),
    Break(
        "the server is not asked whether it takes drawn keys",
        "P4",
        "processors/postgres/writer.py",
        (('if plan.strategy == "keys" and self._strategy in ("auto", "keys"):', "if False:"),),
        (f"{SINGLE}[a part whose operators are out of sight-no fault]",),
    ),
    Break(
        "keys are looked up by their drawn part",
        "P2",
        "processors/postgres/commands.py",
        (("if table.column(name).in_key]", "if name in drawn]"),),
        ("test_postgres_keys.py::test_P2_a_lost_answer_finds_rows_by_the_whole_key",),
    ),
    Break(
        "a value that is cut finds a stranger's key",
        "P2",
        "processors/postgres/commands.py",
        (("        if column.is_cut\n", "        if False\n"),),
        ("test_postgres_keys.py::test_P2_a_key_that_is_too_long_is_no_strangers_when_its_answer_is_lost",),
    ),
    Break(
        "a key is taken, whatever a trigger has met",
        "P3",
        "processors/postgres/keyed.py",
        (("return self._ghosts <= _GHOSTS", "return True"),),
        ("test_postgres_keys.py::test_P3_a_key_that_a_trigger_finds_taken_is_its_jobs_fault",),
    ),
    Break(
        "a taken key is known by the name of its constraint alone",
        "P3",
        "processors/postgres/keyed.py",
        (
            ("if where == (table.schema, table.name, table.key_constraint):", "if where[2] == table.key_constraint:"),
            ("return self._ghosts <= _GHOSTS", "return True"),
        ),
        ("test_postgres_keys.py::test_P3_a_key_that_a_trigger_finds_taken_is_its_jobs_fault[False-of another schema]",),
    ),
    Break(
        "a first attempt is left open when its jobs fail",
        "P4",
        "processors/postgres/keyed.py",
        (("            self._end_attempts()\n            if found", "            if found"),),
        ("test_postgres_keys.py::test_P4_a_first_attempt_that_is_still_open_is_settled_before_its_jobs_fail",),
    ),
    Break(
        "a row that was changed since is nobody's",
        "P4",
        "processors/postgres/keyed.py",
        (("if all_there or self._keyed.may_change or self._count_own():", "if self._count_own():"),),
        ("test_postgres_keys.py::test_P4_on_the_same_server_the_key_alone_says_whose_a_row_is",),
    ),
    Break(
        "a crash makes every key doubtful",
        "P4",
        "processors/postgres/keyed.py",
        (("parts = 2 if self._keyed.is_logged else 3", "parts = 3"),),
        ("test_postgres_keys.py::test_P4_a_crash_takes_back_no_key_that_is_logged",),
    ),
    Break(
        "drawing waits for every standby",
        "P4",
        "processors/postgres/keys.py",
        (("coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'local')", "'on'"),),
        ("test_postgres_keys.py::test_P4_keys_are_drawn_without_a_standby_where_the_role_needs_none",),
        seconds=40,
    ),
    Break(
        "a sequence that ends loses what it had",
        "P3",
        "processors/postgres/keys.py",
        (('return f"WITH d AS', 'count = wanted\n    return f"WITH d AS'),),
        ("test_postgres_as_single.py::test_P3_a_sequence_that_ends_gives_what_it_still_has",),
    ),
    Break(
        "rows matched by their order",
        "P2",
        "processors/postgres/tables.py",
        (
            (
                "return {owners[key]: row for key, row in zip(keys, rows, strict=True)}",
                "return dict(zip(positions, rows[::-1], strict=False))",
            ),
        ),
        ("test_postgres_bulk.py::test_P2_every_table_shape_takes_its_way_and_each_job_gets_its_own_row[serial]",),
    ),
    Break(
        "a named tuple is read by position",
        "P2",
        "processors/postgres/parameters.py",
        (('    if isinstance(job, tuple) and hasattr(kind, "_fields"):', "    if False:"),),
        ("test_jobs_with_names.py::test_a_job_with_names_is_read_by_name_in_every_form",),
    ),
    Break(
        "an UPDATE without RETURNING has no result",
        "P2",
        "processors/postgres/translate.py",
        (("    return int(count) if verb in _COUNTED else None", "    return None"),),
        ("test_postgres_results.py::test_a_command_without_returning_gives_the_number_of_its_rows",),
    ),
    Break(
        "of two result columns of one name the first is dropped",
        "P2",
        "processors/postgres/translate.py",
        (("    if len(set(names)) != len(names):", "    if False:"),),
        ("test_postgres_results.py::test_two_result_columns_of_one_name_are_an_error_at_open",),
    ),
    Break(
        "a merge does not override an identity",
        "P3",
        "processors/postgres/commands.py",
        (
            (
                "aliases, aliases, _listed(target.columns), target.overrides()",
                'aliases, aliases, _listed(target.columns), b""',
            ),
        ),
        ("test_postgres_results.py::test_ids_of_an_identity_that_is_always_generated_go_in[own-3-auto]",),
    ),
    Break(
        "any table of its name is the ledger",
        "P3",
        "processors/postgres/session.py",
        ((', _text(facts[-1], 7) == "1"', ", _text(facts[-1], 6, encoding) is not None"),),
        ("test_postgres_results.py::test_a_table_that_is_not_the_ledger_is_left_alone_with_one_warning",),
    ),
    Break(
        "a parameter's number is counted without the drawn key",
        "P3",
        "processors/postgres/tables.py",
        (
            (
                "        return (*self._form.drawn, *self._form.target.columns), self._whole_row(position)",
                "        return (*self._form.target.columns, *self._form.drawn), self._whole_row(position)",
            ),
        ),
        ("test_postgres_columns.py::test_an_error_names_its_column",),
    ),
    Break(
        "the service names a placeholder instead of a column",
        "P3",
        "service/writer.py",
        (
            (
                '        columns = {f"v{number}": column for number, column in enumerate(submission.columns)}',
                "        columns: dict[str, str] = {}",
            ),
        ),
        ("service/test_routes.py::test_a_job_that_is_refused_for_one_of_its_columns_names_it",),
    ),
    Break(
        "a Decimal inside JSON becomes a float",
        "P2",
        "processors/postgres/documents.py",
        (
            (
                '            return f"{mark}{len(numbers) - 1}"',
                "            numbers.pop()\n            return float(part)",
            ),
        ),
        ("test_postgres_json.py::test_numbers_keep_their_digits",),
    ),
    Break(
        "an empty list for JSON is sent as an array",
        "P2",
        "processors/postgres/typed.py",
        (("return isinstance(value, (list, tuple, Mapping)) and", "return isinstance(value, Mapping) and"),),
        ("test_postgres_json.py::test_a_value_alone_is_the_same_json",),
    ),
    Break(
        "what the server refuses for its type is never asked about",
        "P3",
        "processors/postgres/writer.py",
        (('_MISTYPED = frozenset(("42804", "42846", "42883"))', "_MISTYPED: frozenset[str] = frozenset()"),),
        ("test_postgres_json.py::test_a_value_alone_is_the_same_json",),
    ),
    Break(
        "an empty mapping is taken for an empty sequence",
        "P3",
        "processors/postgres/parameters.py",
        (
            (
                "    return parameters if parameters or not isinstance(parameters, Mapping) else _NOTHING",
                "    return parameters",
            ),
        ),
        ("test_jobs_with_names.py::test_a_job_with_no_names_at_all_fails_alone",),
    ),
    Break(
        "only an Exception of a job's own fails it alone",
        "P3",
        "processors/postgres/errors.py",
        (("    if isinstance(error, Exception):\n        return True\n", "    return isinstance(error, Exception)\n"),),
        ("test_jobs_with_names.py::test_P3_a_payload_that_raises_anything_when_it_is_read_fails_alone",),
    ),
    Break(
        "pg_xact_status believed after a crash",
        "P4",
        "processors/postgres/guard.py",
        (("if marker != token.marker:", "if False:"),),
        ("test_postgres_guard.py::test_P4_a_server_that_restarts_around_commit[before its answer-xid-immediate]",),
        seconds=60,
    ),
    Break(
        "a duplicate blamed on whoever is tried last",
        "P3",
        "processors/postgres/transaction.py",
        (("if isolated.order_mattered() and not self._way.in_order:", "if False:"),),
        ("test_postgres_bulk.py::test_P3_the_earlier_of_two_jobs_wins",),
    ),
    Break(
        "jobs that depend on each other change places",
        "P3",
        "processors/postgres/statement.py",
        (("in_order = True", "in_order = False"),),
        ("test_postgres.py::test_P3_jobs_that_depend_on_each_other_keep_their_order_in_isolation",),
    ),
    Break(
        "deferred constraints are left to COMMIT",
        "P3",
        "processors/postgres/transaction.py",
        (('_IMMEDIATE = b"SET CONSTRAINTS ALL IMMEDIATE"', '_IMMEDIATE = b"SELECT 1"'),),
        ("test_postgres_isolation.py::test_P3_exclusion_and_deferred_constraints",),
    ),
    Break(
        "a flight waits for its answer for ever",
        "P5",
        "processors/postgres/flight.py",
        (("        self._give_up = give_up\n", "        self._give_up = None\n"),),
        ("test_postgres_keys.py::test_P4_a_link_that_breaks_loses_and_doubles_nothing[answer swallowed]",),
        seconds=40,
    ),
    Break(
        "nobody closes the processor in the place of a dead worker",
        "P6",
        "core.py",
        (("return self.touched and self.closes and not self.workers", "return False"),),
        ("test_supervisor.py::test_P6_when_the_last_worker_dies_before_it_closes_the_processor_another_one_closes_it",),
    ),
    Break(
        "a shutdown past its deadline wakes the supervisor again and again",
        "P6",
        "supervisor.py",
        (("if jobs and now >= core.abandon_at:", "if now >= core.abandon_at:"),),
        ("test_supervisor.py::test_P6_past_its_timeout_a_shutdown_rests_while_a_callback_runs",),
    ),
    Break(
        "a shutdown is complete before the threads have begun",
        "P1",
        "life.py",
        (("core.outstanding or core.workers or core.owed or core.cancelling", "core.outstanding or core.workers"),),
        ("test_shutdown.py::test_P1_what_a_shutdown_cancels_is_told_though_no_thread_has_begun_yet",),
    ),
    Break(
        "a second shutdown leaves the last event to the first one",
        "P6",
        "life.py",
        (
            (
                "    finish_without_threads(core)\n    # Another thread",
                "    finish_without_threads(core)\n    if core.finishing:\n        return core.finished\n"
                "    # Another thread",
            ),
        ),
        ("test_threads.py::test_p6_a_second_shutdown_waits_for_the_last_event_of_the_first",),
    ),
    Break(
        "metrics say that they are awake after they were woken",
        "P7",
        "instrumentation/prometheus.py",
        (
            ("            self._asleep = False\n            if self._threads:", "            if self._threads:"),
            (
                "        except RuntimeError:\n            self._asleep = True  # no more",
                "            self._asleep = False\n"
                "        except RuntimeError:\n            self._asleep = True  # no more",
            ),
        ),
        ("test_prometheus.py::test_a_thread_that_falls_asleep_while_it_is_being_woken_is_woken_again",),
    ),
    Break(
        "a signal that comes just before a read is forgotten",
        "P6",
        "_terminal.py",
        (
            (
                "                # After that: a signal that came before it has raised nothing.\n"
                "                if self.count:\n                    return\n                item",
                "                item",
            ),
            (
                "            while True:\n                # A read that blocks",
                "            while not self.count:\n                # A read that blocks",
            ),
        ),
        ("test_cli.py::test_no_signal_between_two_rows_is_lost",),
    ),
    Break(
        "the queue of whoever has taken the name",
        "P1",
        "interpreter.py",
        (('if queue.Queue.__module__ == "queue":', "if True:"),),
        (
            "test_queues.py::test_the_hooks_are_those_of_the_stdlib_though_another_class_has_taken_the_place_of_its_queue",
        ),
    ),
    Break(
        "two workers may write one key",
        "P4",
        "service/store.py",
        (("    key bytea UNIQUE,", "    key bytea,"),),
        ("service/test_idempotency.py::test_both_workers_at_once_write_one_row[same body]",),
    ),
    Break(
        "a job that the store has given up is written all the same",
        "P4",
        "service/writer.py",
        (("{values} WHERE NOT EXISTS (SELECT FROM known) RETURNING", "{values} RETURNING"),),
        ("service/test_store.py::test_a_job_whose_process_is_gone_is_lost_and_stays_so",),
    ),
    Break(
        "who comes second with a key is told of a conflict",
        "P4",
        "service/writer.py",
        (("            return True  # the next attempt sees that entry", "            return False"),),
        ("service/test_idempotency.py::test_both_workers_at_once_write_one_row[same body]",),
    ),
    Break(
        "any id is genuine",
        "HTTP",
        "service/ids.py",
        ((" or not hmac.compare_digest(raw[_SIGNED:], self._signature(raw[:_SIGNED]))", ""),),
        ("service/test_rules.py::test_every_changed_character_makes_an_id_foreign",),
    ),
    Break(
        "any name in Host is answered",
        "HTTP",
        "service/security.py",
        (("        self._check_host(request)\n", ""),),
        ("service/test_security.py::test_a_foreign_host_is_refused",),
    ),
    Break(
        "who waits is not answered at a SIGTERM",
        "P6",
        "service/server.py",
        (("            self._jobs.shutdown()\n            _until", "            _until"),),
        ("service/test_serve.py::test_P6_a_signal_drains_and_answers_who_waits",),
        seconds=40,
    ),
    Break(
        "a fork in the middle of a value",
        "P7",
        "instrumentation/measures.py",
        (
            (
                "before=writing.acquire, after_in_parent=writing.release, after_in_child=writing.release",
                "before=os.getpid",
            ),
        ),
        ("test_prometheus.py::test_P7_a_fork_waits_until_nobody_is_in_the_middle_of_a_value",),
    ),
    Break(
        "a feed without bound",
        "P5",
        "service/feed.py",
        (("while next(iter(self.seconds)) <= at - HISTORY:", "while False:"),),
        ("service/test_feed.py::test_P5_the_feed_is_bounded",),
    ),
    Break(
        "a server's timeout may be any number",
        "P5",
        "processors/postgres/session.py",
        (("return min(_LONGEST, max(1, left))", "return max(1, left)"),),
        ("test_postgres_links.py::test_P5_a_deadline_beyond_what_a_server_can_count_is_kept",),
    ),
    Break(
        "what is deferred in somebody else's transaction is not looked at",
        "P3",
        "processors/postgres/transaction.py",
        (("        return not any(map(is_error, [there, *checked])) and", "        return False and"),),
        ("test_postgres_deferred.py::test_P3_a_deferred_violation_fails_its_job_alone_inside_a_transaction",),
    ),
    Break(
        "the owner's violations are the jobs'",
        "P3",
        "processors/postgres/transaction.py",
        (("        return not any(map(is_error, [there, *checked])) and", "        return"),),
        ("test_postgres_deferred.py::test_a_violation_of_the_owners_own_is_not_blamed_on_a_job",),
    ),
    Break(
        "what the owner has deferred is immediate afterwards",
        "P3",
        "processors/postgres/transaction.py",
        (
            (
                "return self._written(positions, checked=not self._inside)",
                "return self._written(positions, checked=True)",
            ),
        ),
        ("test_postgres_deferred.py::test_what_the_owner_has_deferred_stays_deferred",),
    ),
    Break(
        "the slow way leaves what is deferred to the owner",
        "P3",
        "processors/postgres/portable.py",
        (("self._rehearses = self._inside and self._is_clean()", "self._rehearses = False"),),
        ("test_postgres_deferred.py::test_P3_a_lone_job_meets_its_deferred_violation[portable]",),
    ),
    Break(
        "a driver in a URL is part of its scheme",
        "P9",
        "processors/postgres/conninfo.py",
        (('    name, _, driver = scheme.lower().partition("+")\n', '    name, _, driver = scheme.lower(), "", ""\n'),),
        ("test_postgres_sources.py::test_a_connection_string_is_read_as_its_people_write_it",),
    ),
    Break(
        "hosts in a query are libpq's",
        "P9",
        "processors/postgres/conninfo.py",
        (("if driver or _has_ports_in_query(rest):", "if driver:"),),
        ("test_postgres_sources.py::test_a_connection_string_is_read_as_its_people_write_it",),
    ),
    Break(
        "a callable is asked before every batch",
        "P7",
        "processors/postgres/sources.py",
        (("if self._own.is_ready() and not fresh:", "if False:"),),
        ("test_postgres_sources.py::test_a_callable_may_give_the_connection_string_when_it_is_needed",),
    ),
    Break(
        "a lazy connection is nobody's to cut",
        "P5",
        "processors/postgres/sources.py",
        (("        self._own.abandon(batch)\n", "        pass\n"),),
        ("test_postgres_sources.py::test_P5_a_connection_of_a_lazy_string_is_cut_at_the_deadline",),
    ),
    Break(
        "what is known of a lent connection is kept in a table",
        "P5",
        "processors/postgres/borrowed.py",
        (
            ("_Known: TypeAlias =", "_KEPT: dict[object, Any] = {}\n_Known: TypeAlias ="),
            (
                "known[self] = (session.facts, session.memory)",
                "known[self] = _KEPT[connection] = (session.facts, session.memory)",
            ),
        ),
        ("test_postgres_links.py::test_P5_a_connection_that_was_lent_is_not_kept_in_memory",),
    ),
    Break(
        "a record that is too long ends where its limit is",
        "load",
        "_rows.py",
        (("if not quoting.is_open:", "if True:"),),
        ("test_cli.py::test_nothing_inside_a_quoted_field_is_a_row",),
    ),
    Break(
        "JSON that is nested too deep ends the load",
        "load",
        "_rows.py",
        (("except RecursionError:", "except ZeroDivisionError:"),),
        ("test_cli.py::test_json_is_nested_as_deep_as_it_goes_and_then_refused",),
    ),
    Break(
        "a file that is cut short is at its end",
        "load",
        "load.py",
        (("if self._size and min(", "if False and min("),),
        ("test_cli.py::test_a_file_that_is_cut_short_while_it_is_read_is_an_error",),
    ),
    Break(
        "a value is cast to its domain",
        "P4",
        "processors/postgres/commands.py",
        (("    if column.array is None:\n", "    if True:\n"), ("column.base.encode()", "column.type.encode()")),
        ("test_postgres_settings.py::test_P3_what_is_too_long_for_its_type_is_refused_in_a_batch_as_alone[keys-code]",),
    ),
    Break(
        "a type with a cast of its own is cast",
        "P4",
        "processors/postgres/commands.py",
        (("    if column.array is None:\n", "    if True:\n"),),
        ("test_postgres_settings.py::test_a_type_reads_text_by_its_input_function_in_a_batch_as_alone[keys-regclass]",),
    ),
    Break(
        "NULL goes as a word",
        "P4",
        "processors/postgres/values.py",
        (("_NULL = _LENGTH.pack(-1)", '_NULL = _LENGTH.pack(4) + b"NULL"'),),
        ("test_postgres_settings.py::test_NULL_is_no_word_where_arrays_have_no_NULL[keys-text]",),
    ),
    Break(
        "bytes go as the session writes literals",
        "P4",
        "processors/postgres/conversions.py",
        (
            (
                '    if connection.pgconn.parameter_status(b"standard_conforming_strings") == b"off":\n',
                "    if False:\n",
            ),
        ),
        ("test_postgres_settings.py::test_bytes_are_the_same_under_every_setting",),
    ),
    Break(
        "a row that cannot be loaded is an error",
        "P4",
        "processors/postgres/translate.py",
        (
            (
                "            return [self._one(answer, number) for number in range(answer.ntuples)]",
                "            raise",
            ),
        ),
        ("test_postgres_reading.py::test_what_python_has_no_value_for_is_written_and_comes_back_as_text",),
    ),
    Break(
        "the portable way takes what cannot be loaded for an error",
        "P4",
        "processors/postgres/portable.py",
        (("if cursor.format != Format.TEXT:", "if True:"),),
        ("test_postgres_reading.py::test_what_python_has_no_value_for_is_written_and_comes_back_as_text",),
    ),
    Break(
        "an array of bytes is read by psycopg's faster loader",
        "P4",
        "processors/postgres/conversions.py",
        (("    if loads_bytes:\n", "    if False:\n"),),
        ("test_postgres_settings.py::test_bytes_are_the_same_under_every_setting",),
    ),
    Break(
        "a refused password is waited for",
        "P9",
        "processors/postgres/refused.py",
        (("return code.startswith(_FOR_GOOD)", "return False"),),
        ("test_postgres_links.py::test_P9_who_is_refused_for_good_is_told_at_once[wrong_password-a string]",),
    ),
    Break(
        "what libpq says is waited for",
        "P9",
        "processors/postgres/refused.py",
        (("return bool(_SAID_FOR_GOOD.search(text)) and not _FOR_A_WHILE.search(text)", "return False"),),
        ("test_postgres_links.py::test_P9_who_is_refused_for_good_is_told_at_once",),
    ),
    Break(
        "libpq keeps the code to itself",
        "P9",
        "processors/postgres/connecting.py",
        (("        ask_for_code(pgconn)\n", ""),),
        ("test_postgres_links.py::test_P9_who_is_refused_for_good_is_told_at_once",),
    ),
    Break(
        "a pool is not asked why it has no connection",
        "P9",
        "processors/postgres/borrowed.py",
        (("                self._ask_why(give_up)\n", ""),),
        ("test_postgres_links.py::test_P9_a_pool_that_is_refused_for_good_says_so",),
    ),
    Break(
        "one host that refuses speaks for all",
        "P9",
        "processors/postgres/refused.py",
        (
            (
                "{host for host, _ in attempts} == {host for host, for_good in attempts if for_good}",
                "any(for_good for _, for_good in attempts)",
            ),
        ),
        ("test_postgres_links.py::test_one_host_that_refuses_while_another_is_down_is_tried_again",),
    ),
    Break(
        "half a connection is thrown away",
        "P5",
        "processors/postgres/connections.py",
        (("stock.pause(making)", "making.close()"),),
        ("test_postgres_links.py::test_P5_jobs_in_a_hurry_get_a_link_that_takes_longer_than_they_have",),
    ),
    Break(
        "a connection is waited for as long as it takes",
        "P5",
        "processors/postgres/connections.py",
        (("link = making.finish(give_up)", "link = making.finish(None)"),),
        ("test_postgres_links.py::test_P5_no_connection_is_waited_for_beyond_the_deadline",),
    ),
    Break(
        "no descriptor left is an error of the job",
        "P5",
        "processors/postgres/connecting.py",
        (("if isinstance(error, OSError) and not isinstance(error, _FILES):", "if False:"),),
        ("test_postgres_links.py::test_a_job_outlasts_a_second_without_descriptors",),
    ),
    Break(
        "SQL goes in UTF-8 whatever the session reads",
        "P4",
        "processors/postgres/conversions.py",
        (('return sql if encoding == "utf-8" else', "return sql if True else"),),
        ("test_postgres_encodings.py::test_a_session_of_every_encoding_gives_and_takes_str[keys-LATIN1]",),
    ),
    Break(
        "our connections take the server's encoding",
        "P4",
        "processors/postgres/conninfo.py",
        (('    "client_encoding": "UTF8",\n', ""),),
        ("test_postgres_encodings.py::test_P3_what_the_database_cannot_hold_fails_its_job_and_names_the_encoding",),
    ),
    Break(
        "the encoding is not named",
        "P3",
        "processors/postgres/conversions.py",
        (('if not isinstance(error, UnicodeEncodeError) or error.encoding == "utf-8":', "if True:"),),
        ("test_postgres_encodings.py::test_a_session_of_every_encoding_gives_and_takes_str[keys-WIN1252]",),
    ),
    Break(
        "text in SQL_ASCII comes back as bytes",
        "P4",
        "processors/postgres/conversions.py",
        (("_load(adapters, _TEXT_LOADERS, _LenientTextLoader)", "pass"),),
        ("test_postgres_encodings.py::test_what_is_no_text_in_SQL_ASCII_comes_back_as_bytes[keys]",),
    ),
    Break(
        "what was made under one setting is used under another",
        "P4",
        "processors/postgres/writer.py",
        (("known.settings != settings_of(session.connection)", "False"),),
        ("test_postgres_encodings.py::test_a_lent_session_may_change_between_two_batches",),
    ),
    Break(
        "the catalogue has to fit into the session's encoding",
        "P4",
        "processors/postgres/session.py",
        (("ELSE 'UTF8' END", "ELSE 'LATIN1' END"),),
        ("test_postgres_encodings.py::test_what_the_table_says_of_itself_need_not_fit_into_the_session[keys]",),
    ),
    Break(
        "rows are committed without a look at their table",
        "P4",
        "processors/postgres/transaction.py",
        (
            (
                "        looks = self.lookout.look(flight)\n        if checked:",
                "        looks = 0\n        if checked:",
            ),
        ),
        (
            "test_postgres_changes.py::test_P4_no_value_is_read_as_the_type_that_its_column_had_yesterday"
            "[id-statement-timestamp to timestamptz]",
        ),
    ),
    Break(
        "rows with drawn keys are committed without a look at their table",
        "P4",
        "processors/postgres/keyed.py",
        (("        looks = self.lookout.look(flight)\n", "        looks = 0\n"),),
        (
            "test_postgres_changes.py::test_P2_what_raises_no_error_is_noticed_by_the_next_batch"
            "[False-3-another default]",
        ),
    ),
    Break(
        "the look comes ahead of the rows",
        "P4",
        "processors/postgres/keyed.py",
        (
            (
                "        count = self._way.send(flight, positions)\n        looks = self.lookout.look(flight)\n",
                "        looks = self.lookout.look(flight)\n        before += looks\n"
                "        count = self._way.send(flight, positions)\n",
            ),
        ),
        ("test_postgres_changes.py::test_P4_a_change_that_a_batch_waits_for_is_seen_by_it[1-keys]",),
    ),
    Break(
        "a job is blamed without a look at its table",
        "P4",
        "processors/postgres/transaction.py",
        (("self._roll_back(look=kind is Kind.PERMANENT)", "self._roll_back()"),),
        (
            "test_postgres_changes.py::test_P4_no_value_is_read_as_the_type_that_its_column_had_yesterday"
            "[id-statement-int to bigint]",
        ),
    ),
    Break(
        "what is out of date stays prepared",
        "P4",
        "processors/postgres/processor.py",
        (("                session.forget_prepared()\n", ""),),
        ("test_postgres_changes.py::test_P4_statements_that_vanish_are_prepared_anew[isolate-3-user's own]",),
    ),
    Break(
        "a transaction that could not even begin was ended by its statement",
        "P4",
        "processors/postgres/transaction.py",
        (("        if not is_error(answers[0]):", "        if True:"),),
        ("test_postgres_changes.py::test_P4_statements_that_vanish_are_prepared_anew[isolate-3-user's own]",),
    ),
    Break(
        "a COMMIT that was not even begun is unknown",
        "P4",
        "processors/postgres/transaction.py",
        (("if self._inside or self._session.status == TransactionStatus.INERROR:", "if self._inside:"),),
        ("test_postgres_changes.py::test_P4_a_commit_that_vanishes_is_not_unknown[user's own]",),
    ),
    Break(
        "a draw that is refused keeps its connection",
        "P4",
        "processors/postgres/keyed.py",
        (("            if kind is Kind.READ_ONLY:\n                self._session.retire()\n", ""),),
        ("test_postgres_changes.py::test_P4_a_database_that_was_read_only_for_a_while_is_written_again",),
    ),
    Break(
        "a draw that is refused looks at nothing again",
        "P4",
        "processors/postgres/keyed.py",
        (
            (
                "            self._check_outdated(error, kind is Kind.PERMANENT and self._has_moved())\n",
                "",
            ),
        ),
        ("test_postgres_changes.py::test_P4_keys_are_drawn_from_where_the_table_has_them_from_today[50-another one]",),
    ),
    Break(
        "a retry writes what was put together for the table of before",
        "P4",
        "processors/postgres/writer.py",
        (("return way.with_form(planned.form) if is_same else None", "return way if is_same else None"),),
        (
            "test_postgres_changes.py::test_P4_a_lost_answer_and_a_change_before_the_retry"
            "[ALTER TABLE ITEM ALTER v TYPE timestamptz USING v AT TIME ZONE 'UTC'-3-False]",
        ),
    ),
    Break(
        "a retry sends its keys to a table that draws none any more",
        "P4",
        "processors/postgres/writer.py",
        (('is_same = planned.plan.strategy == "keys" and planned', 'is_same = "keys" == "keys" or planned'),),
        (
            "test_postgres_changes.py::test_P4_a_lost_answer_and_a_change_before_the_retry"
            "[CREATE TRIGGER a BEFORE INSERT ON ITEM FOR EACH ROW EXECUTE FUNCTION nothing()-3-False]",
        ),
    ),
    Break(
        "the columns of a user's statement are not looked at",
        "P4",
        "processors/postgres/lookout.py",
        (("return sum(flight.describe_prepared(table) for table in self._tables)", "return 0"),),
        (
            "test_postgres_changes.py::test_P4_no_value_is_read_as_the_type_that_its_column_had_yesterday"
            "[id-user's own-timestamp to timestamptz]",
        ),
    ),
    Break(
        "the stamp of a table leaves its triggers out",
        "P2",
        "processors/postgres/lookout.py",
        (("WHEN c.relhastriggers OR c.relkind = 'p' THEN", "WHEN false THEN"),),
        (
            "test_postgres_changes.py::test_P2_what_raises_no_error_is_noticed_by_the_next_batch"
            "[False-3-one that had been disabled]",
        ),
    ),
    Break(
        "the slow path lets psycopg prepare",
        "P4",
        "processors/postgres/portable.py",
        (("        self._connection.prepare_threshold = None\n", ""),),
        ("test_postgres_changes.py::test_P4_the_slow_path_prepares_nothing",),
    ),
    Break(
        "a lent transaction believes the look of before",
        "P4",
        "processors/postgres/writer.py",
        ((" < _REREAD_SECONDS and not is_inside:", " < _REREAD_SECONDS:"),),
        ("test_postgres_changes.py::test_P4_nor_with_one_that_takes_json_since_then",),
    ),
    Break(
        "our own questions depend on the session's settings",
        "P4",
        "processors/postgres/session.py",
        (("recoded(settled(command.decode()).encode(), self.connection)", "recoded(command, self.connection)"),),
        ("test_postgres_settings.py::test_a_table_is_looked_at_and_written_alike_under_every_setting",),
    ),
    Break(
        "an instant loses its offset",
        "P4",
        "processors/postgres/values.py",
        (("    if not _is_instant(value):\n", "    if True:\n"),),
        ("test_postgres_settings.py::test_an_instant_is_the_same_as_in_any_statement",),
    ),
    Break(
        "an operator of an extension in the question about a table",
        "P4",
        "processors/postgres/catalogue.py",
        (("OPERATOR(pg_catalog.@>)", "@>"),),
        ("test_postgres_settings.py::test_operators_that_an_extension_brings_do_not_disturb",),
    ),
    Break(
        "values are cast to the column's type with its modifier, which cuts them",
        "P4",
        "processors/postgres/commands.py",
        (
            (
                "    if column.array is None:\n",
                '    if column.full_type:\n        return b"%s::%s" % (text, column.full_type.encode())\n'
                "    if column.array is None:\n",
            ),
        ),
        ("test_postgres_types.py::test_P4_a_value_is_stored_as_a_plain_insert_stores_it_or_refused[floats-keys]",),
        seconds=60,
    ),
    Break(
        "rows are looked up by the drawn part of their key",
        "P2",
        "processors/postgres/commands.py",
        (
            (
                "self.key = [i for i, name in enumerate(names) if table.column(name).in_key]",
                "self.key = [i for i, name in enumerate(names) if name in drawn]",
            ),
        ),
        (
            "test_postgres_shapes.py::test_P4_a_table_of_any_shape_ends_as_single_inserts_leave_it"
            "[partitions by a given part of the key-auto-lost]",
        ),
    ),
    Break(
        "a job that no key was left for completes with the others whose answer is lost",
        "P4",
        "processors/postgres/keyed.py",
        (("results = [failed.get(i) for i", "results = [self._way.refused.get(i) for i"),),
        (
            "test_postgres_shapes.py::test_P4_a_table_of_any_shape_ends_as_single_inserts_leave_it"
            "[a sequence that runs dry within a batch-auto-lost]",
        ),
    ),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.breaks", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth of them")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time")
    arguments = parser.parse_args(argv)
    strangers = set(arguments.names) - {each.name for each in BREAKS}
    if strangers:
        parser.error(f"no break has the name {', '.join(map(repr, sorted(strangers)))}; see --list")
    chosen = [each for each in BREAKS if not arguments.names or each.name in arguments.names][:: arguments.every]
    if arguments.list:
        print("\n".join(f"{each.promise:4} {each.name}" for each in chosen))
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        unbroken = [pool.submit(check_unbroken, tests) for tests in halves(chosen)]
        found = list(pool.map(check, chosen))
        sound = [future.result() for future in unbroken]
    print(f"{sum(found)} of {len(found)} breaks are noticed")
    return not all(sound + found)


def halves(chosen: list[Break]) -> list[list[str]]:
    tests = list(dict.fromkeys(test for broken in chosen for test in broken.tests))
    return [half for half in (tests[::2], tests[1::2]) if half]


def check_unbroken(tests: list[str]) -> bool:
    """A test that fails anyway notices nothing: all of them pass on an unbroken copy."""
    with tempfile.TemporaryDirectory(prefix="microbatch-breaks-") as directory:
        copy(Path(directory))
        code, output = run(tests, Path(directory), seconds=120, in_all=UNBROKEN_SECONDS)
    if code != 0:
        print(f"the tests fail without any break:\n{output[-3000:]}", flush=True)
    return code == 0


def check(broken: Break) -> bool:
    """Whether its tests notice the break; says how."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="microbatch-breaks-") as directory:
        copy(Path(directory))
        verdict = apply(broken, Path(directory))
        noticed = False
        if verdict is None:
            code, output = run(broken.tests, Path(directory), broken.seconds)
            by = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
            # Only a test that failed counts, or one that had to be stopped: not one that could not be collected.
            noticed = code == 1 or code is None
            verdict = f"noticed by {by[1] if by else 'a run that had to be stopped'}"
            if not noticed:
                verdict = f"NOT NOTICED, pytest exited with {code}\n{output[-1000:]}"
    print(f"{broken.promise:4} {broken.name} ({time.monotonic() - began:.0f} s): {verdict}", flush=True)
    return noticed


def copy(directory: Path) -> None:
    for part in ("microbatch", "tests"):
        shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.rst"):
        shutil.copy(ROOT / name, directory / name)


def apply(broken: Break, directory: Path) -> str | None:
    """Change the copy; what is wrong if the break does not fit the source any more."""
    path = directory / "microbatch" / broken.file
    text = path.read_text()
    for old, new in broken.edits:
        if text.count(old) != 1:
            return f"DOES NOT APPLY, its text stands {text.count(old)} times in {broken.file}: {old!r}"
        text = text.replace(old, new)
    compile(text, str(path), "exec")
    path.write_text(text)
    return None


def run(tests: Sequence[str], directory: Path, seconds: int, in_all: float = RUN_SECONDS) -> tuple[int | None, str]:
    """pytest's exit code, None if it had to be stopped, and what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"--timeout={seconds}", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(directory), "MICROBATCH_MODEL_SHRINK": "no"}
    process = subprocess.Popen(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=in_all)
    except subprocess.TimeoutExpired:
        kill_all(process)
        return None, process.communicate()[0]
    kill_all(process)
    return process.returncode, output


def kill_all(process: subprocess.Popen[str]) -> None:
    """Its children too: a broken fork may leave some."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
