"""The end of a process: whatever was accepted is drained, within a bound, however the program ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from programs import Program, Told, run

from microbatch import MicroBatcher, life

# What the interpreter itself may take to start and to end on a busy machine.
GRACE = 4.0

ENDINGS = {
    "returns": ("pass", 0),
    "raises": ("raise LookupError('the program failed')", 1),
    "sys.exit": ("sys.exit(3)", 3),
    "SIGTERM": ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); note('ready'); time.sleep(60)", 4),
    "SIGINT": ("note('ready'); time.sleep(60)", -signal.SIGINT),
}

CIRCUMSTANCES = {
    "queued": "MicroBatcher(Writer(0.1))",
    "slow": "MicroBatcher(Writer(0.05), max_batch_size=3)",
    "retries": "MicroBatcher(Writer(0.01, failures=2), max_batch_size=5)",
    "retry far away": "MicroBatcher(Writer(failures=2), retry=Later(backoff=0.2))",
    "lingering": "MicroBatcher(Writer(), linger=15, max_batch_size=50)",
    "two workers": "MicroBatcher(Writer(0.05), max_batch_size=3, max_concurrent_batches=2)",
}


def end(script: str, directory: Path, ending: str) -> Told:
    """Run *script* and have it end that way once it is ready."""
    last, code = ENDINGS[ending]
    with Program(f"{script}\n{last}\n", directory) as program:
        if ending.startswith("SIG"):
            program.wait_for("ready")
            program.send(getattr(signal, ending))
        told = program.end()
    assert told.code == code, told
    return told


@pytest.mark.parametrize(
    ("ending", "circumstance"),
    [
        (ending, circumstance)
        for ending in ENDINGS
        for circumstance in CIRCUMSTANCES
        if circumstance == "queued" or ending in ("returns", "SIGTERM")
    ],
)
def test_P6_everything_accepted_is_drained_at_exit(tmp_path: Path, ending: str, circumstance: str) -> None:
    told = end(f"batcher = {CIRCUMSTANCES[circumstance]}\nsubmit(batcher, range(20))", tmp_path, ending)

    told.assert_drained(20)
    assert told.said("closed") == [""]
    assert told.lines[-1][0] in ("closed", "outcome")
    assert told.seconds < 3 + GRACE


PLACES = {
    "a function": """
        def main():
            submit(MicroBatcher(Writer(0.1)), range(20))
        main()
    """,
    "a thread": """
        def main():
            batcher = MicroBatcher(Writer(0.1))
            submit_one(batcher, "first")
            while not batcher._core.ready:  # Python 3.12 starts no thread once the end has begun
                time.sleep(0.001)
            started.set()
            time.sleep(0.1)
            submit(batcher, range(19))
        started = threading.Event()
        threading.Thread(target=main).start()
        started.wait()
    """,
    "a daemon thread": """
        def main():
            submit(MicroBatcher(Writer(0.1)), range(20))
        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        thread.join()
    """,
    "an object in a cycle": """
        class Owner:
            def __init__(self):
                self.me = self
                self.batcher = MicroBatcher(Writer(0.1))
        submit(Owner().batcher, range(20))
    """,
    "a forgotten one": """
        batcher = MicroBatcher(Writer(0.1))
        submit(batcher, range(20))
        del batcher
        gc.collect()
    """,
    "several": """
        batchers = [MicroBatcher(Writer(0.1)) for _ in range(5)]
        for number, batcher in enumerate(batchers):
            submit(batcher, range(number * 4, number * 4 + 4))
    """,
    "beside others": """
        unused = MicroBatcher(Writer())
        idle = MicroBatcher(Writer())
        idle.execute("warm")
        done = MicroBatcher(Writer())
        done.shutdown()
        batcher = MicroBatcher(Writer(0.1))
        submit(batcher, range(20))
        note("accepted", "warm")
        note("outcome", "warm completed")
    """,
    "closing already": """
        batcher = MicroBatcher(Writer(0.1))
        submit(batcher, range(20))
        batcher.shutdown(wait=False)
    """,
    "a with that is interrupted": """
        def interrupt():
            while not batcher._core.closers:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        processor = Gated()
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
        try:
            with MicroBatcher(processor) as batcher:
                submit(batcher, range(20))
                threading.Thread(target=interrupt).start()
        finally:
            assert not batcher.shutdown(wait=False).finished
            processor.gate.set()
    """,
}


@pytest.mark.parametrize("place", PLACES)
def test_P6_it_does_not_matter_where_the_batcher_is_kept(tmp_path: Path, place: str) -> None:
    told = run(PLACES[place], tmp_path)

    told.assert_quiet()
    told.assert_drained(21 if place == "beside others" else 20)
    assert told.seconds < 3 + GRACE


# Bounds.


def test_P6_a_stuck_processor_delays_the_end_by_delivery_timeout_at_most(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(stuck=True), delivery_timeout=0.7, max_batch_size=5)
        submit_together(batcher, range(20))
        time.sleep(0.6)  # the end's own bound is so much later than the jobs'
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert told.outcomes() == {"unknown:OutcomeUnknown": 5, "failed:DeliveryTimeout": 15}
    assert told.seconds < 0.7 + GRACE


SMALLER_BOUND = """
import microbatch.life, microbatch.supervisor
microbatch.life.CLOSE_SECONDS = microbatch.supervisor.CLOSE_SECONDS = 2.0
"""


def test_P6_a_stuck_processor_without_delivery_timeout_is_left_behind(tmp_path: Path) -> None:
    told = run(
        SMALLER_BOUND
        + """
retry = RetryPolicy(max_attempts=3)
batcher = MicroBatcher(Writer(stuck=True), delivery_timeout=None, retry=retry, max_batch_size=5)
submit_together(batcher, range(20))
""",
        tmp_path,
    )

    told.assert_quiet()
    assert told.outcomes() == {"unknown:OutcomeUnknown": 5, "failed:BatcherClosed": 15}
    # One bound and not one for each of the two hooks.
    assert 2.0 <= told.seconds < 4.0


def test_P6_a_job_with_more_time_than_its_batcher_does_not_prolong_the_end(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(stuck=True), delivery_timeout=2)
        submit(batcher, range(20), delivery_timeout=600)
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert sum(told.outcomes().values()) == 20
    assert told.outcomes()["failed:BatcherClosed"] + told.outcomes()["unknown:OutcomeUnknown"] == 20
    assert told.seconds < 4.0


def test_P6_the_bounds_of_several_batchers_are_not_added_up(tmp_path: Path) -> None:
    told = run(
        """
        batchers = [MicroBatcher(Writer(stuck=True), delivery_timeout=1) for _ in range(6)]
        for number, batcher in enumerate(batchers):
            submit(batcher, [number], delivery_timeout=600)
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert told.outcomes() == {"unknown:OutcomeUnknown": 6}
    assert told.seconds < 1 + GRACE


@pytest.mark.parametrize(
    "hook",
    ["futures[0].add_done_callback(stuck)", "batcher.on(JobCompleted, stuck)", "batcher.on(BatcherShutDown, stuck)"],
)
def test_P6_a_stuck_callback_or_listener_delays_the_end_by_delivery_timeout_at_most(tmp_path: Path, hook: str) -> None:
    told = run(
        f"""
        def stuck(_):
            note("stuck")
            threading.Event().wait()

        processor = Gated()
        batcher = MicroBatcher(processor, delivery_timeout=0.7)
        futures = submit_together(batcher, range(20))
        {hook}
        processor.gate.set()
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert sorted(told.said("processed")) == sorted(told.said("accepted"))
    assert told.seconds < 0.7 + GRACE


@pytest.mark.parametrize(
    "script",
    [
        "batcher = MicroBatcher(Writer())",
        "batcher = MicroBatcher(Writer()); batcher.shutdown()",
        "batcher = MicroBatcher(Writer()); batcher.execute(1)",
        "batcher = MicroBatcher(Writer()); batcher.execute(1); batcher.shutdown()",
        "batcher = MicroBatcher(Writer()); batcher.execute(1); del batcher; gc.collect()",
        "batcher = MicroBatcher(Writer(), max_concurrent_batches=4); submit(batcher, range(7)); batcher.flush()",
        "from microbatch.testing import InlineBatcher; batcher = InlineBatcher(Writer()); batcher.submit(1)",
        "from microbatch.testing import InlineBatcher; batcher = InlineBatcher(Writer()); batcher.hold().__enter__(); "
        "batcher.submit(1)",
    ],
    ids=["unused", "closed unused", "idle", "closed", "forgotten", "idle with four workers", "inline", "inline, held"],
)
def test_P6_with_nothing_to_do_the_end_is_immediate(tmp_path: Path, script: str) -> None:
    told = run(script, tmp_path)

    told.assert_quiet()
    assert told.seconds < GRACE


def test_P6_a_processor_that_works_on_after_its_deadline_does_not_disturb_the_end(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(2.0), delivery_timeout=0.8)
        submit_together(batcher, range(20))
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert told.outcomes() == {"unknown:OutcomeUnknown": 20}


def test_P6_a_second_interrupt_ends_an_end_that_takes_too_long(tmp_path: Path) -> None:
    script = """
        from microbatch import life

        def noted(name):
            wait = getattr(life, name)

            def noting(*arguments):
                note(name)
                return wait(*arguments)

            setattr(life, name, noting)

        noted("wait_for_all")
        noted("wait_for_finish")
        batcher = MicroBatcher(Writer(stuck=True), delivery_timeout=600)
        submit(batcher, range(20))
        atexit.register(note, "late")
    """
    with Program(script, tmp_path) as program:
        program.wait_for("stuck")
        program.wait_for("wait_for_all")
        program.send(signal.SIGINT)
        program.wait_for("wait_for_finish")
        program.send(signal.SIGINT)
        told = program.end(30)

    assert told.said("processed") == []
    assert told.said("late") == [""]


def test_P6_a_handler_that_exits_does_not_cut_an_end_short(tmp_path: Path) -> None:
    told = run(
        """
        from microbatch import life

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))

        def interrupt(name):
            wait, left = getattr(life, name), [1, 2, 3]

            def interrupted(*arguments):
                if left:
                    note("interrupted", name, left.pop())
                    signal.raise_signal(signal.SIGTERM)
                return wait(*arguments)

            setattr(life, name, interrupted)

        interrupt("wait_for_all")
        interrupt("wait_for_finish")
        batcher = MicroBatcher(Writer(0.1), max_batch_size=3)
        submit(batcher, range(20))
        atexit.register(lambda: submit(batcher, range(20, 40)))
        atexit.register(note, "flushed")
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(40)
    assert len(told.said("interrupted")) == 6
    words = [line[0] for line in told.lines]
    assert words[: words.index("flushed")].count("processed") == 20, told


# Who still submits while the process ends.


@pytest.mark.parametrize("daemon", [False, True])
def test_P6_threads_that_submit_while_the_interpreter_ends(tmp_path: Path, daemon: bool) -> None:
    told = run(
        f"""
        batcher = MicroBatcher(Writer(0.01), max_batch_size=7)
        batcher.execute("first")
        note("accepted", "first")
        note("outcome", "first completed")

        def client(number):
            for job in range(200):
                try:
                    submit_one(batcher, f"{{number}}-{{job}}")
                except BatcherClosed:
                    note("refused", f"{{number}}-{{job}}")
                time.sleep(0.002)

        for number in range(5):
            threading.Thread(target=client, args=(number,), daemon={daemon}).start()
        time.sleep(0.05)
        """,
        tmp_path,
    )

    told.assert_quiet()
    accepted, processed = told.said("accepted"), told.said("processed")
    if daemon:
        # A daemon thread may be frozen between the acceptance and its note.
        assert set(accepted) <= set(processed)
        assert len(processed) - len(accepted) <= 5
        assert len(processed) == len(set(processed))
    else:
        told.assert_drained(1001)
    assert not set(told.said("refused")) & set(processed)


def test_P6_a_thread_blocked_in_submit_at_the_end_gets_its_place(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(0.1), max_outstanding=5)
        submit_one(batcher, "first")
        while not batcher._core.ready:  # Python 3.12 starts no thread once the end has begun
            time.sleep(0.001)
        threading.Thread(target=submit, args=(batcher, range(19))).start()
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(20)


def test_P6_jobs_from_atexit_callbacks(tmp_path: Path) -> None:
    told = run(
        """
        import atexit

        def too_late():
            try:
                submit_one(batcher, "too late")
            except BatcherClosed:
                note("refused", "too late")

        atexit.register(too_late)
        from ledger import *
        from microbatch import *

        batcher = MicroBatcher(Writer(0.05))
        submit_one(batcher, "before")
        atexit.register(lambda: submit(batcher, range(19)))
        """,
        tmp_path,
        preamble="",
    )

    told.assert_quiet()
    told.assert_drained(20)
    assert told.said("refused") == ["too late"]


def test_P6_the_first_submit_of_a_process_in_an_atexit_callback(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(0.05))

        @atexit.register
        def first():
            try:
                submit(batcher, range(20))
            except RuntimeError as error:
                note("refused", error)
            assert batcher.stats().submitted == len(lines("accepted")), batcher.stats()

        def lines(word):
            return [line for line in open(os.environ["LEDGER"]) if line.startswith(word)]
        """,
        tmp_path,
    )

    assert_drained_or_refused(told, 20)


def assert_drained_or_refused(told: Told, count: int) -> None:
    """From 3.12 on no thread starts at the end of an interpreter, and so nothing is accepted."""
    told.assert_quiet()
    if told.said("refused"):
        assert sys.version_info >= (3, 12)
        assert told.said("accepted") == told.said("processed") == []
    else:
        told.assert_drained(count)
    assert told.seconds < GRACE


def test_P6_the_first_submit_of_a_process_in_a_thread_that_outlives_the_main_one(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(0.05))

        def first():
            threading.main_thread().join()
            time.sleep(0.1)
            try:
                submit(batcher, range(20))
            except RuntimeError as error:
                note("refused", error)

        threading.Thread(target=first).start()
        """,
        tmp_path,
    )

    assert_drained_or_refused(told, 20)


def test_P6_a_processor_with_an_executor_of_its_own_drains(tmp_path: Path) -> None:
    told = run(
        """
        from concurrent.futures import ThreadPoolExecutor

        executor = ThreadPoolExecutor(4)
        # Its threads start now: at the end newer Pythons start none.
        barrier = threading.Barrier(4)
        list(executor.map(lambda _: barrier.wait(), range(4)))

        class Spreads(Writer):
            def process(self, batch):
                time.sleep(0.1)
                return list(executor.map(lambda job: note("processed", job), batch))

        batcher = MicroBatcher(Spreads())
        submit(batcher, range(20))
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(20)


def test_P6_batchers_made_while_the_process_ends_do_not_disturb_it(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(0.3))
        submit(batcher, range(20))
        kept = []

        def make():
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                kept.extend(MicroBatcher(Writer()) for _ in range(20))
                kept[:10] = []

        for _ in range(3):
            threading.Thread(target=make).start()
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(20)


def test_P6_one_line_in_the_log_tells_of_a_drained_end(tmp_path: Path) -> None:
    told = run(
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        batcher = MicroBatcher(Writer(), linger=15, max_batch_size=50, name="payments")
        submit(batcher, range(20))
        """,
        tmp_path,
    )

    assert told.code == 0
    assert [line for line in told.stderr.splitlines() if "drained" in line] == ["payments: drained at exit"]


# A forgotten batcher in a process that goes on.


def test_P6_a_forgotten_batcher_drains_and_its_threads_end(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(0.1), max_batch_size=6)
        futures = submit(batcher, range(20))
        del batcher
        gc.collect()
        for future in futures:
            future.result(30)
        until = time.monotonic() + 30
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(0.01)
        note("threads", threading.active_count())
        note("early", len([line for line in open(os.environ["LEDGER"]) if line.startswith("closed")]))
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(20)
    assert told.said("threads") == ["1"]
    assert told.said("early") == ["1"]


def test_P6_a_forgotten_idle_batcher_is_collected(tmp_path: Path) -> None:
    told = run(
        """
        import weakref
        for _ in range(20):
            batcher = MicroBatcher(Writer())
            batcher.execute(1)
            gone = weakref.ref(batcher)
            del batcher
            assert gone() is None
        until = time.monotonic() + 30
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(0.01)
        gc.collect()
        from microbatch.core import Core
        note("threads", threading.active_count())
        note("cores", sum(isinstance(thing, Core) for thing in gc.get_objects()))
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert told.said("threads") == ["1"]
    assert told.said("cores") == ["0"]


# Finalisers and signal handlers, which run between any two instructions.


def test_P1_finalisers_that_submit(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(Writer(), max_batch_size=50, max_outstanding=100_000)
        count = iter(range(10**9))
        futures = []

        class Grave:
            def __init__(self):
                self.me = self

            def __del__(self):
                futures.append(batcher.submit(f"grave {next(count)}"))

        def dig(number):
            for job in range(2000):
                Grave()
                futures.append(batcher.submit(f"{number} {job}"))

        gc.set_threshold(20, 2, 2)
        Grave()
        gc.collect()
        diggers = [threading.Thread(target=dig, args=(number,)) for number in range(4)]
        for digger in diggers:
            digger.start()
        for digger in diggers:
            digger.join()
        gc.set_threshold(0)
        # More than once: while another thread collects, it does nothing.
        until = time.monotonic() + 30
        while len(futures) < 2 * 8000 + 1 and time.monotonic() < until:
            gc.collect()
            time.sleep(0.01)
        for future in list(futures):
            future.result(30)
        note("submitted", len(futures))
        note("stats", batcher.stats().submitted, batcher.stats().completed, batcher.stats().outstanding)
        """,
        tmp_path,
    )

    told.assert_quiet()
    submitted = int(told.said("submitted")[0])
    assert submitted > 8000
    assert told.said("stats") == [f"{submitted} {submitted} 0"]
    processed = told.said("processed")
    assert len(processed) == len(set(processed)) >= submitted


def test_P1_finalisers_that_submit_while_threads_start(tmp_path: Path) -> None:
    told = run(
        """
        class Grave:
            def __init__(self, batcher, number):
                self.me, self.batcher, self.number = self, batcher, number

            def __del__(self):
                note("accepted", self.number)
                futures.append(self.batcher.submit(self.number))

        gc.set_threshold(1, 1, 1)
        # Held, because a batcher that dies together with the finaliser may be closed first.
        futures, batchers = [], []
        for number in range(0, 400, 2):
            batcher = MicroBatcher(Writer(), max_concurrent_batches=2)
            batchers.append(batcher)
            Grave(batcher, number)
            note("accepted", number + 1)
            futures.append(batcher.submit(number + 1))
        gc.set_threshold(0)
        # More than once: while another thread collects, it does nothing.
        until = time.monotonic() + 30
        while len(futures) < 400 and time.monotonic() < until:
            gc.collect()
            time.sleep(0.01)
        for future in futures:
            note("outcome", future.result(30), "completed")
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(400)


STORM = """
class Interrupt(BaseException):
    pass

armed = False

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise Interrupt

signal.signal(signal.SIGALRM, interrupt)

def storm(seconds=0.0003):
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

def calm():
    global armed
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.parametrize(
    "options", ["", "queue=__import__('queue').Queue", "queue=__import__('queue').PriorityQueue", "max_outstanding=3"]
)
def test_P1_signal_handlers_that_raise_inside_submit(tmp_path: Path, options: str) -> None:
    told = run(
        STORM
        + f"""
batcher = MicroBatcher(Writer(), max_batch_size=10, {options})
batcher.execute("first")
got, futures, interrupts = [], {{}}, 0
storm()
until = time.monotonic() + 0.5
give_up = until + 20
job = 0
while time.monotonic() < until or interrupts <= 100 and time.monotonic() < give_up:
    job += 1
    try:
        armed = True
        future = batcher.submit(job)
        futures[job] = future
        armed = False
    except Interrupt:
        interrupts += 1
    armed = False
calm()
assert batcher.flush(30)
for job, future in futures.items():
    assert future.result(0) == job
stats = batcher.stats()
assert stats.outstanding == stats.queued == stats.unknown == stats.failed == 0, stats
note("interrupts", interrupts)
note_all("accepted", futures)
note("tried", job)
batcher.execute("last")
assert batcher.shutdown(timeout=10).finished
""",
        tmp_path,
    )

    told.assert_quiet()
    accepted, processed = told.said("accepted"), told.said("processed")
    assert int(told.said("interrupts")[0]) > 100
    assert set(accepted) <= set(processed)
    assert len(processed) == len(set(processed))
    assert processed[-1] == "last"


def test_P1_signal_handlers_that_raise_inside_the_first_submit(tmp_path: Path) -> None:
    told = run(
        STORM
        + """
interrupts = 0
for number in range(180):
    batcher = MicroBatcher(Writer(), max_concurrent_batches=1 + number % 3)
    signal.setitimer(signal.ITIMER_REAL, 0.00001 + number % 60 / 100_000)
    try:
        armed = True
        future = batcher.submit(number)
        armed = False
        note("accepted", number)
    except (Interrupt, RuntimeError):
        # The stdlib's own wait for the new thread turns some interrupts into its "release unlocked lock".
        armed = False
        interrupts += 1
        future = batcher.submit(f"again {number}")
        note("accepted", f"again {number}")
    calm()
    future.result(30)
    assert batcher.shutdown(timeout=30).finished
    assert batcher.stats().unknown == 0
note("interrupts", interrupts)
note("threads", threading.active_count())
""",
        tmp_path,
    )

    # Interrupts that hit a weak reference's callback are reported there and go no further.
    assert told.code == 0, told
    accepted, processed = told.said("accepted"), told.said("processed")
    assert int(told.said("interrupts")[0]) > 20
    assert set(accepted) <= set(processed)
    assert len(processed) == len(set(processed))


@pytest.mark.parametrize("wait", ["future.result()", "future.exception()", "batcher.flush()"])
def test_P1_signal_handlers_that_raise_inside_a_wait(tmp_path: Path, wait: str) -> None:
    told = run(
        STORM
        + f"""
batcher = MicroBatcher(Writer(0.001), max_batch_size=10)
interrupts = 0
storm(0.0005)
until = time.monotonic() + 0.5
give_up = until + 20
job = 0
while time.monotonic() < until or interrupts <= 100 and time.monotonic() < give_up:
    job += 1
    future = batcher.submit(job)
    while not future.done():
        try:
            armed = True
            {wait}
            armed = False
        except Interrupt:
            interrupts += 1
        armed = False
    assert future.result(0) == job
calm()
note("interrupts", interrupts)
note("tried", job)
assert batcher.stats().completed == job, batcher.stats()
assert batcher.shutdown(timeout=30).finished
""",
        tmp_path,
    )

    told.assert_quiet()
    assert int(told.said("interrupts")[0]) > 100
    assert sorted(map(int, told.said("processed"))) == list(range(1, int(told.said("tried")[0]) + 1))


def test_P6_interrupts_at_the_end_of_a_with(tmp_path: Path) -> None:
    told = run(
        STORM
        + """
interrupts = 0
batchers = []
for number in range(150):
    signal.setitimer(signal.ITIMER_REAL, 0)
    batcher = MicroBatcher(Writer(0.002))
    batchers.append(batcher)
    try:
        with batcher:
            submit(batcher, range(number * 5, number * 5 + 5))
            armed = True
            signal.setitimer(signal.ITIMER_REAL, 0.00001 + number % 50 / 10_000)
        armed = False
    except Interrupt:
        interrupts += 1
    armed = False
calm()
for batcher in batchers:
    assert batcher.shutdown(timeout=30).finished
note("interrupts", interrupts)
""",
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(750)
    assert int(told.said("interrupts")[0]) > 20


# A quiet process.


def test_P8_no_wake_ups_while_nothing_is_outstanding(tmp_path: Path) -> None:
    told = run(
        """
        def switches():
            found = 0
            for task in os.listdir("/proc/self/task"):
                for line in open(f"/proc/self/task/{task}/status"):
                    if line.startswith("voluntary_ctxt_switches"):
                        if int(task) != os.getpid():
                            found += int(line.split()[1])
            return found

        batchers = [
            MicroBatcher(Writer(), delivery_timeout=0.5),
            MicroBatcher(Writer(), delivery_timeout=0.5, linger=0.05, max_concurrent_batches=3),
            MicroBatcher(Writer(failures=2), delivery_timeout=1.0),
        ]
        for batcher in batchers:
            for future in [batcher.submit(job) for job in range(50)]:
                future.result(30)
        time.sleep(1.7)  # until the supervisors have seen that no deadline is left
        before = switches()
        time.sleep(2)
        note("wake-ups", switches() - before)
        """,
        tmp_path,
    )

    told.assert_quiet()
    assert int(told.said("wake-ups")[0]) <= 1


def test_P6_a_thread_that_is_just_being_started_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = threading.Thread(target=lambda: time.sleep(0.05), daemon=True)
    looks, closed = [[], [thread], [thread]], []

    def look() -> list[threading.Thread]:
        if len(looks) == 2:
            thread.start()
        return looks.pop()

    monkeypatch.setattr(life, "_other_threads", look)
    monkeypatch.setattr(life, "_close_at_exit", lambda: closed.append(thread.is_alive()))
    life._join_and_close()
    assert closed == [False]


def test_P6_a_thread_that_never_got_started_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interruption inside `Thread.start` leaves it."""
    closed = []
    monkeypatch.setattr(life, "_STARTING", 0.001)
    monkeypatch.setattr(life, "_other_threads", lambda: [threading.Thread()])
    monkeypatch.setattr(life, "_close_at_exit", lambda: closed.append("closed"))
    life._join_and_close()
    assert closed == ["closed"]


def test_P6_whoever_completed_a_shutdown_has_let_go_of_the_lock() -> None:
    """A thread that the interpreter stops at its end must not hold it: a finaliser may come and ask."""

    class SlowToken:
        def put(self) -> None:
            time.sleep(0.3)

    gate = threading.Event()
    batcher = MicroBatcher(lambda jobs: gate.wait(30) and None)
    batcher.submit("job")
    free = []

    def shut_down() -> None:
        batcher._core.close()
        life.wait_for_finish(batcher._core, 30)
        free.append(batcher._core.lock.acquire(blocking=False))
        if free[0]:
            batcher._core.lock.release()

    thread = threading.Thread(target=shut_down)
    thread.start()
    while not batcher._core.closers:
        time.sleep(0.001)
    batcher._core.closers.append(SlowToken())  # type: ignore[arg-type]
    gate.set()
    thread.join(30)

    assert free == [True]
