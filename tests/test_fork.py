"""Forks: the child starts empty and works, the parent's jobs stay the parent's, inherited futures end at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import Told, run

# In a forked child: what a child may ask of a future that it inherited, and how it is answered.
QUESTIONS = """
from concurrent.futures import wait, as_completed

def ask(future):
    '''One word for what the future says, asked in every way; every way is bounded.'''
    answers = set()
    began = time.monotonic()
    for question in (
        lambda: future.result(),
        lambda: future.result(20),
        lambda: type(future.exception()).__name__,
        lambda: type(next(as_completed([future], 20)).exception()).__name__,
        lambda: [type(done.exception()).__name__ for done in wait([future], 20).done][0],
    ):
        try:
            answers.add(question())
        except Exception as error:
            answers.add(type(error).__name__)
    answers.add(future.status.value)
    assert future.done() and not future.cancel()
    assert time.monotonic() - began < 5
    return "/".join(sorted(map(str, answers)))
"""

SITUATIONS = {
    "queued": "MicroBatcher(processor, max_batch_size=1)",
    "running": "MicroBatcher(processor)",
    "lingering": "MicroBatcher(processor, linger=15, max_batch_size=50)",
    "waiting for a retry": "MicroBatcher(Gated(failing=True), retry=Later(backoff=1.0))",
    "two workers": "MicroBatcher(processor, max_batch_size=5, max_concurrent_batches=2)",
}


def assert_every_child_is_well(told: Told, children: int = 1) -> None:
    told.assert_quiet()
    assert told.said("joined") == ["0"] * children, told


def assert_processed_once_by_its_own(told: Told) -> None:
    """Every process did exactly the jobs that it accepted itself."""
    accepted, processed = told.said_by("accepted"), told.said_by("processed")
    assert {pid: sorted(jobs) for pid, jobs in accepted.items()} == {
        pid: sorted(jobs) for pid, jobs in processed.items()
    }, told


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "no hooks"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_P7_inherited_futures_are_unknown_in_the_child(tmp_path: Path, situation: str, hooks: bool) -> None:
    told = run(
        QUESTIONS
        + f"""
processor = Gated()
batcher = {SITUATIONS[situation]}
futures = submit(batcher, range(10))
time.sleep(0.1)

def work():
    if not {hooks}:
        # Without hooks the child notices at its first call into the batcher.
        assert not any(future.done() for future in futures)
        assert batcher.stats().outstanding == 0
    for future in futures:
        note("answer", ask(future))
    assert batcher.stats().outstanding == batcher.stats().submitted == 0
    submit(batcher, range(100, 110))
    assert batcher.shutdown().finished

join({"child" if hooks else "hookless_child"}(work))
assert not any(future.done() for future in futures)
batcher._core.processor.process.__self__.gate.set()
batcher.shutdown()
assert [future.result(0) for future in futures] == list(range(10))
""",
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert told.said("answer") == ["ForkedError/unknown"] * 10
    assert_processed_once_by_its_own(told)
    # By the callbacks: an inherited one does not run in the child.
    assert told.outcomes() == {"completed": 20}


# Each is asked in a child of its own, first thing, forked while other threads hold every lock there is.
CALLS = """
futures[-1].result()
futures[-1].result(20)
futures[-1].exception()
futures[-1].status
futures[-1].job_id
futures[-1].cancel()
batcher.status('known')
batcher.flush()
batcher.shutdown()
batcher.stats()
batcher.submit('new')
batcher.submit_many(['new'])
batcher.on(JobCompleted, print)
batcher.off(JobCompleted, listen)
globals().pop('batcher'); gc.collect()
repr(batcher), repr(futures)
atexit._run_exitfuncs()
threading._shutdown()
pass
"""


def test_P7_a_fork_without_hooks_finds_no_lock_held(tmp_path: Path) -> None:
    calls = CALLS.strip().splitlines()
    told = run(
        f"""
from microbatch import job

def listen(event):
    pass

batcher = MicroBatcher(Writer(), linger=10, max_batch_size=50)
batcher.on(JobCompleted, listen)
futures = submit(batcher, range(20))
batcher.submit("known", job_id="known")

def hold(lock, held, release):
    with lock:
        held.release()
        release.wait()

def fork_with_locks_held(work):
    held, release = threading.Semaphore(0), threading.Event()
    locks = [batcher._core.lock, job._births]
    for lock in locks:
        threading.Thread(target=hold, args=(lock, held, release), daemon=True).start()
    for lock in locks:
        assert held.acquire(timeout=20)
    pid = hookless_child(work)
    release.set()
    return pid

def work(call):
    signal.alarm(20)
    began = time.monotonic()
    try:
        exec(call, globals())
    except (ForkedError, JobNotFound, BatcherClosed):
        pass
    if "batcher" in globals():
        try:
            batcher.submit_many(["more"] * 50)[0].result(10)
        except BatcherClosed:
            pass
    assert time.monotonic() - began < 5, time.monotonic() - began
    note("worked", call)

calls = {calls!r}
for pid in [fork_with_locks_held(lambda: work(call)) for call in calls]:
    join(pid)
""",
        tmp_path,
    )

    assert_every_child_is_well(told, len(calls))
    assert sorted(told.said("worked")) == sorted(calls)
    parent = told.lines[0][1]
    assert sorted(told.said_by("processed")[parent]) == sorted([*told.said("accepted"), "known"])
    assert told.outcomes() == {"completed": 20}


def test_P7_somebody_else_waits_for_the_future_at_the_fork(tmp_path: Path) -> None:
    told = run(
        QUESTIONS
        + """
processor = Gated()
batcher = MicroBatcher(processor, max_batch_size=5)
futures = submit(batcher, range(20))

def waiter(future):
    future.result()

def group_waiter():
    wait(futures)

def held(future):
    with future._condition:
        processor.gate.wait()

threads = [threading.Thread(target=waiter, args=(future,)) for future in futures]
threads += [threading.Thread(target=group_waiter), threading.Thread(target=held, args=(futures[-1],))]
for thread in threads:
    thread.start()
time.sleep(0.1)

def work():
    for future in futures:
        note("answer", ask(future))

join(child(work))
processor.gate.set()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
""",
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert told.said("answer") == ["ForkedError/unknown"] * 20
    told.assert_drained(20)


def test_P7_callbacks_of_the_parent_run_in_the_parent_only(tmp_path: Path) -> None:
    told = run(
        """
processor = Gated()
batcher = MicroBatcher(processor)
gate = threading.Event()

def first(future):
    note("first", os.getpid() == parent)
    gate.wait()

def second(future):
    note("second", os.getpid() == parent)

parent = os.getpid()
futures = batcher.submit_many(range(5))
for future in futures:
    future.add_done_callback(first)
    future.add_done_callback(second)
batcher.on(JobCompleted, lambda event: note("event", os.getpid() == parent))
processor.gate.set()
# The worker is in the middle of the callbacks now: some ran, some did not, all futures are done.
while not all(future.done() for future in futures):
    time.sleep(0.01)

def work():
    for future in futures:
        assert future.done()
        future.add_done_callback(lambda future: note("third"))
    batcher.execute(99)
    batcher.shutdown()

join(child(work))
gate.set()
batcher.shutdown()
""",
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert told.said("first") == told.said("second") == ["True"] * 5
    assert told.said("third") == [""] * 5
    assert sorted(told.said("event")) == ["False"] + ["True"] * 5


def test_P7_nothing_is_started_before_the_first_submit_in_each_process(tmp_path: Path) -> None:
    told = run(
        """
class Opened(Writer):
    def open(self):
        note("opened")

def look(where):
    note("threads", where, threading.active_count(), len(os.listdir("/proc/self/task")))

batcher = MicroBatcher(Opened(), max_concurrent_batches=2)
batcher.stats(), batcher.flush(), repr(batcher)
look("made")
batcher.execute(1)
look("used")

def work():
    look("child")
    batcher.stats(), batcher.flush(), repr(batcher)
    look("child asked")
    batcher.execute(2)
    look("child used")
    batcher.shutdown()

join(child(work))
batcher.shutdown()
""",
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert told.said("threads") == ["made 1 1", "used 4 4", "child 1 1", "child asked 1 1", "child used 4 4"]
    assert [line[0] for line in told.lines].count("opened") <= 4
    assert set(told.said_by("closed")) == set(told.said_by("opened"))


@pytest.mark.parametrize("queue", ["MemoryQueue", "stdlib queue", "factory"])
def test_P7_forks_under_load(tmp_path: Path, queue: str) -> None:
    options = {
        "MemoryQueue": "",
        "stdlib queue": "queue=__import__('queue').PriorityQueue(50_000),",
        "factory": "queue=lambda: __import__('queue').SimpleQueue(),",
    }[queue]
    told = run(
        f"""
batcher = MicroBatcher(Writer(), max_batch_size=20, max_outstanding=50_000, max_concurrent_batches=2, {options})
stop = False
futures = []

def client(number):
    job = 0
    while not stop:
        futures.append(batcher.submit(f"{{number}}-{{job}}"))
        note("accepted", f"{{number}}-{{job}}")
        job += 1
        if job % 3 == 0:
            futures[-1].result(60)
        if job % 50 == 0:
            futures[-1].job_id, batcher.stats(), batcher.submit("c").cancel()

threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
for thread in threads:
    thread.start()

def in_the_child(name):
    for future in futures[-20:]:
        try:
            future.result(30)
        except ForkedError:
            pass
    submit(batcher, [f"{{name}}-{{job}}" for job in range(5)])

begun = False
for number in range(40):
    pid = os.fork()
    if pid == 0:
        # Kept from the threads' loop, which does not run here.
        try:
            in_the_child(f"child {{number}}")
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(9)
        if number % 2:
            assert batcher.shutdown().finished
            os._exit(0)
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(0)
    join(pid)
stop = True
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
for future in list(futures):
    future.result(60)
note("parent", batcher.stats().outstanding, batcher.stats().unknown, batcher.stats().failed)
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 40)
    assert told.said("parent") == ["0 0 0"]
    processed = [job for job in told.said("processed") if job != "c"]
    assert sorted(processed) == sorted(told.said("accepted"))
    assert len(set(processed)) == len(processed)
    assert len(told.said_by("processed")) == 41


def test_P7_forked_children_that_end_as_programs_end(tmp_path: Path) -> None:
    told = run(
        """
batcher = MicroBatcher(Writer(0.02), max_batch_size=3)
submit(batcher, [f"parent {job}" for job in range(60)])
pids = []
for number in range(12):
    pid = os.fork()
    if pid == 0:
        submit(batcher, [f"{number}-{job}" for job in range(20)])
        if number % 3 == 0:
            sys.exit(0)
        if number % 3 == 1:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            os.kill(os.getpid(), signal.SIGTERM)
        break
    pids.append(pid)
else:
    for pid in pids:
        join(pid)
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 12)
    told.assert_drained(300)
    assert_processed_once_by_its_own(told)


def test_P7_a_child_that_never_touches_the_batcher_ends_at_once(tmp_path: Path) -> None:
    told = run(
        """
processor = Gated()
batcher = MicroBatcher(processor, max_batch_size=5)
submit(batcher, range(10))
for fork in (os.fork, hookless_fork):
    began = time.monotonic()
    pid = fork()
    if pid == 0:
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(0)
    join(pid)
    assert time.monotonic() - began < 5
processor.gate.set()
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 2)
    told.assert_drained(10)


# multiprocessing: its forked children run no atexit hooks.

MODULE = """
from ledger import *
from microbatch import *

batcher = None

def make(**options):
    global batcher
    seconds = options.pop("seconds", 0.02)
    batcher = MicroBatcher(Writer(seconds), **options)

def work(name):
    if batcher is None:
        make(max_batch_size=3)
    submit(batcher, [f"{name}-{job}" for job in range(20)])

def work_with_slow_callbacks(name):
    make()
    def slow(job):
        time.sleep(0.02)
        note("called", job)
    for job in range(20):
        future = submit_one(batcher, f"{name}-{job}")
        future.add_done_callback(lambda future, job=job: slow(job))

def work_on_a_thread(name):
    make()
    submit(batcher, [f"{name}-{job}" for job in range(3)])
    def later():
        threading.main_thread().join(0.3)
        submit(batcher, [f"{name}-later-{job}" for job in range(17)])
    threading.Thread(target=later).start()

def work_and_fail(name):
    work(name)
    raise SystemExit(0)
"""


@pytest.mark.parametrize("target", ["work", "work_with_slow_callbacks", "work_on_a_thread", "work_and_fail"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_P6_multiprocessing_children_drain_before_they_end(tmp_path: Path, method: str, target: str) -> None:
    (tmp_path / "children.py").write_text(MODULE)
    told = run(
        f"""
        import multiprocessing, children

        if __name__ == "__main__":
            context = multiprocessing.get_context("{method}")
            children.make(max_batch_size=3)
            submit(children.batcher, [f"parent-{{job}}" for job in range(20)])
            processes = [context.Process(target=children.{target}, args=(number,)) for number in range(3)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(50)
                note("joined", process.exitcode)
        """,
        tmp_path,
    )

    assert_every_child_is_well(told, 3)
    told.assert_drained(80)
    assert_processed_once_by_its_own(told)
    assert len(told.said("called")) == (60 if target == "work_with_slow_callbacks" else 0)
    assert len(told.said("closed")) == 4


def test_P6_multiprocessing_children_drain_where_the_private_hook_is_missing(tmp_path: Path) -> None:
    told = run(
        """
        import concurrent.futures.thread, threading
        del threading._register_atexit
        from ledger import *
        from microbatch import *
        import multiprocessing

        def target():
            submit(batcher, [f"child-{job}" for job in range(20)])

        batcher = MicroBatcher(Writer(0.02), max_batch_size=3)
        submit(batcher, [f"parent-{job}" for job in range(20)])
        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        process.join(50)
        note("joined", process.exitcode)
        """,
        tmp_path,
        preamble="",
    )

    assert_every_child_is_well(told)
    told.assert_drained(40)
    assert_processed_once_by_its_own(told)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_P6_children_of_a_pool_and_of_an_executor_drain_before_they_end(tmp_path: Path, method: str) -> None:
    (tmp_path / "children.py").write_text(MODULE)
    told = run(
        f"""
        import multiprocessing, children
        from concurrent.futures import ProcessPoolExecutor

        if __name__ == "__main__":
            context = multiprocessing.get_context("{method}")
            children.make(max_batch_size=3)
            submit(children.batcher, [f"parent-{{job}}" for job in range(20)])
            pool = context.Pool(2, maxtasksperchild=1)
            pool.map(children.work, ["p0", "p1", "p2", "p3"], chunksize=1)
            pool.close()
            pool.join()
            with ProcessPoolExecutor(2, mp_context=context) as executor:
                list(executor.map(children.work, ["e0", "e1", "e2", "e3"]))
        """,
        tmp_path,
    )

    told.assert_quiet()
    told.assert_drained(180)
    assert_processed_once_by_its_own(told)


def test_P6_a_multiprocessing_child_with_a_stuck_processor_ends_within_delivery_timeout(tmp_path: Path) -> None:
    told = run(
        """
        import multiprocessing

        batcher = MicroBatcher(Writer(stuck=True), delivery_timeout=1.0, max_batch_size=5)

        def target():
            submit_together(batcher, range(20))

        process = multiprocessing.get_context("fork").Process(target=target)
        began = time.monotonic()
        process.start()
        process.join(50)
        note("joined", process.exitcode)
        note("seconds", time.monotonic() - began)
        """,
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert 1.0 <= float(told.said("seconds")[0]) < 4.0
    assert told.outcomes()["unknown:OutcomeUnknown"] == 5
    assert sum(told.outcomes().values()) == 20


# Forks on the batcher's own threads.

PLACES = {
    "processor": """
        class Forks(Writer):
            def process(self, batch):
                fork()
                return super().process(batch)
        batcher = MicroBatcher(Forks())
    """,
    "callback": """
        processor = Gated()
        batcher = MicroBatcher(processor)
        on_first = lambda future: fork()
        release = processor.gate.set
    """,
    "listener": """
        batcher = MicroBatcher(Writer(0.05))
        listen_last = lambda event: fork() if event.job == 0 else None
    """,
    "batch listener": """
        batcher = MicroBatcher(Writer(0.05))
        batcher.on(BatchStarted, lambda event: fork())
    """,
    "open": """
        class Forks(Writer):
            def open(self):
                fork()
        batcher = MicroBatcher(Forks())
    """,
    "abandon": """
        class Forks(Stuck):
            def abandon(self, batch):
                fork()
        batcher = MicroBatcher(Forks(), delivery_timeout=1.0)
    """,
    "callback on a thread of its own": """
        batcher = MicroBatcher(Stuck(), delivery_timeout=1.0)
        on_first = lambda future: fork()
    """,
}

WORKS = {
    "ends": "",
    "uses the batcher": """
        batcher.submit("child 1").result(20)
        note("accepted", "child 1")
        note("accepted", "child 2")
        batcher.submit("child 2")
        assert batcher.shutdown().finished
    """,
}


@pytest.mark.parametrize("work", [*WORKS, "returns"])
@pytest.mark.parametrize("place", PLACES)
def test_P7_forks_on_a_thread_of_the_batcher(tmp_path: Path, place: str, work: str) -> None:
    script = f"""
        children = []
        on_first = listen_last = release = None
        parent = os.getpid()

        class Stuck(Writer):
            def process(self, batch):
                if os.getpid() == parent:
                    threading.Event().wait()
                return super().process(batch)

        def fork():
            if children:
                return
            pid = os.fork()
            children.append(pid)
            if pid == 0 and {work != "returns"}:
                run_and_end(in_the_child)

        def in_the_child():
            pass
{WORKS.get(work, "").replace("        ", "            ")}

{PLACES[place]}
        batcher.on(JobCompleted, lambda event: note("event", event.job))
        batcher.on(JobFailed, lambda event: note("event", event.job) or note("error", repr(event.error)))
        if listen_last is not None:
            batcher.on(JobCompleted, listen_last)
        note_all("accepted", range(20))
        futures = batcher.submit_many(range(20))
        for future in futures:
            if on_first is not None:
                future.add_done_callback(on_first)
        for future in futures:
            future.add_done_callback(lambda future: note("called"))
        if release is not None:
            release()
        for future in futures:
            future.exception(30)
        until = time.monotonic() + 20
        while not children and time.monotonic() < until:
            time.sleep(0.01)
        batcher.shutdown()
        for pid in children:
            join(pid)
    """
    told = run(script, tmp_path, patience=20)

    assert_every_child_is_well(told)
    parent = told.lines[0][1]
    # In the parent: each job once, with its callback and its event.
    assert sorted(told.said_by("event")[parent]) == sorted(map(str, range(20)))
    assert len(told.said_by("called")[parent]) == 20
    done = told.said_by("processed").get(parent, [])
    assert sorted(done, key=int) == ([] if "Stuck" in PLACES[place] else [str(job) for job in range(20)])
    # In the child: only its own.
    for pid in {line[1] for line in told.lines} - {parent}:
        mine = ["child 1", "child 2"] if work == "uses the batcher" else []
        assert told.said_by("event").get(pid, []) == mine
        assert told.said_by("called").get(pid, []) == []
        if work != "returns" or place != "processor":
            assert told.said_by("processed").get(pid, []) == mine


# Other moments.


@pytest.mark.parametrize("fork", ["os.fork", "hookless_fork"])
def test_P7_a_fork_while_the_parent_closes(tmp_path: Path, fork: str) -> None:
    told = run(
        f"""
processor = Gated()
batcher = MicroBatcher(processor, max_batch_size=5)
batcher.on(BatcherShutDown, lambda event: note("shutdown", event.completed))
futures = submit(batcher, range(20))
# A daemon: after a fork without hooks Python itself would wait for another one for ever.
closer = threading.Thread(target=batcher.shutdown, daemon=True)
closer.start()
while "shutting down" not in repr(batcher):
    time.sleep(0.01)
time.sleep(0.1)
began = time.monotonic()
pid = {fork}()
if pid == 0:
    try:
        batcher.submit(99)
    except BatcherClosed:
        note("refused")
    assert batcher.shutdown().finished
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(0)
join(pid)
assert time.monotonic() - began < 5
processor.gate.set()
closer.join(30)
pid = {fork}()
if pid == 0:
    assert batcher.shutdown().finished
    try:
        batcher.submit(99)
    except BatcherClosed:
        note("refused")
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(0)
join(pid)
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 2)
    told.assert_drained(20)
    assert told.said("refused") == ["", ""]
    parent = told.lines[0][1]
    assert told.said_by("shutdown")[parent] == ["20"]


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "no hooks"])
def test_P7_a_child_of_a_child(tmp_path: Path, hooks: bool) -> None:
    told = run(
        QUESTIONS
        + f"""
child = {"child" if hooks else "hookless_child"}
processor = Gated()
batcher = MicroBatcher(processor, max_batch_size=5)
first = submit(batcher, range(10))

def work():
    processor.home, processor.gate = os.getpid(), threading.Event()
    second = submit(batcher, range(10, 20))

    def work():
        batcher.stats()
        for future in first + second:
            note("answer", ask(future))
        submit(batcher, range(20, 30))
        batcher.shutdown()

    join(child(work))
    processor.gate.set()
    batcher.shutdown()

join(child(work))
processor.gate.set()
batcher.shutdown()
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 2)
    assert told.said("answer") == ["ForkedError/unknown"] * 20
    told.assert_drained(30)
    assert_processed_once_by_its_own(told)


def test_P7_a_forgotten_batcher_is_not_drained_by_the_child(tmp_path: Path) -> None:
    told = run(
        """
for fork in (os.fork, hookless_fork):
    processor = Gated()
    batcher = MicroBatcher(processor, max_batch_size=5)
    submit(batcher, [f"{fork.__name__} {job}" for job in range(10)])
    pid = fork()
    if pid == 0:
        del batcher
        gc.collect()
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(0)
    del batcher
    gc.collect()
    join(pid)
    processor.gate.set()
""",
        tmp_path,
    )

    assert_every_child_is_well(told, 2)
    told.assert_drained(20)
    assert len(told.said_by("processed")) == 1


def test_P7_listeners_and_priorities_go_on_in_the_child(tmp_path: Path) -> None:
    told = run(
        """
import queue
gate = threading.Event()

class Gated(Writer):
    def process(self, batch):
        gate.wait(30)
        return super().process(batch)

batcher = MicroBatcher(Gated(), queue=queue.PriorityQueue(), max_batch_size=1)
batcher.on(JobCompleted, lambda event: note("event", event.job))

def work():
    global gate
    gate = threading.Event()  # the parent's worker may have been inside that one
    futures = [batcher.submit("first")]
    while batcher.stats().queued:
        time.sleep(0.01)
    futures += [batcher.submit(job, priority=job) for job in range(5)]
    gate.set()
    batcher.shutdown()

batcher.submit("parent's")
join(child(work))
gate.set()
batcher.shutdown()
""",
        tmp_path,
    )

    assert_every_child_is_well(told)
    assert told.said("processed") == told.said("event") == ["first", "4", "3", "2", "1", "0", "parent's"]


def test_P7_a_queue_factory_that_fails_in_the_child_harms_nobody_else(tmp_path: Path) -> None:
    told = run(
        """
logging.disable()
fail = False

def factory():
    if fail:
        raise OSError("no queue")
    return MemoryQueue()

processor = Gated()
bad = MicroBatcher(processor, queue=factory)
good = [MicroBatcher(processor) for _ in range(5)]
inherited = [batcher.submit("inherited") for batcher in [bad, *good]]
time.sleep(0.05)

def work():
    from concurrent.futures import wait
    assert not wait(inherited, 20).not_done
    for future in inherited:
        assert isinstance(future.exception(), ForkedError)
    try:
        bad.submit(1)
    except OSError:
        note("refused")
    for batcher in good:
        batcher.execute("child's")
    global fail
    fail = False
    bad.execute("child's")

fail = True
pid = child(work)
fail = False
join(pid)
processor.gate.set()
""",
        tmp_path,
    )

    assert told.code == 0
    assert told.said("joined") == ["0"]
    assert told.said("refused") == [""]
    assert sorted(told.said("processed")) == ["child's"] * 6 + ["inherited"] * 6
