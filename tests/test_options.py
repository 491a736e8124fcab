"""Every option, good and bad; the options of the environment; and what the messages say."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
from naming import named

from microbatch import MemoryQueue, MicroBatcher, RetryPolicy
from microbatch.options import Options, options_from_env
from microbatch.testing import FaultyProcessor, InlineBatcher

FOREVER = float("inf")
NAN = float("nan")

GOOD = [
    {"max_batch_size": 1},
    {"max_batch_size": 20_000, "max_outstanding": 10},
    {"linger": 0},
    {"linger": 19.9},
    {"linger": 1000.0, "delivery_timeout": None, "retry": None},
    {"max_concurrent_batches": 64},
    {"max_outstanding": 1},
    {"when_full": "block"},
    {"when_full": "raise"},
    {"submit_timeout": 0},
    {"submit_timeout": threading.TIMEOUT_MAX},
    {"delivery_timeout": 0.001},
    {"delivery_timeout": 86_400},
    {"delivery_timeout": None, "retry": None},
    {"delivery_timeout": None, "retry": RetryPolicy(max_attempts=3)},
    {"retry": None},
    {"retry": RetryPolicy(backoff=0)},
    {"queue": MemoryQueue},
    {"queue": queue.SimpleQueue()},
    {"queue": lambda: queue.PriorityQueue(5)},
    {"history": 0},
    {"history_ttl": 0.5},
    {"name": "payments"},
]

BAD_TYPES = [
    ("max_batch_size", "100", "a whole number"),
    ("max_batch_size", 1.0, "a whole number"),
    ("max_batch_size", True, "a whole number"),
    ("max_batch_size", None, "a whole number"),
    ("linger", "0.1", "a number of seconds"),
    ("linger", None, "a number of seconds"),
    ("linger", False, "a number of seconds"),
    ("max_concurrent_batches", 1.5, "a whole number"),
    ("max_outstanding", None, "a whole number"),
    ("submit_timeout", None, "a number of seconds"),
    ("submit_timeout", "5", "a number of seconds"),
    ("delivery_timeout", "20", "a number of seconds"),
    ("delivery_timeout", True, "a number of seconds"),
    ("retry", 3, "a RetryPolicy or None"),
    ("retry", RetryPolicy, "a RetryPolicy or None"),
    ("queue", [], "a factory"),
    ("history", 1e3, "a whole number"),
    ("history_ttl", "300", "a number of seconds"),
    ("name", None, "a string"),
    ("name", b"payments", "a string"),
]

BAD_VALUES = [
    ("max_batch_size", 0, "at least 1"),
    ("max_batch_size", -5, "at least 1"),
    ("linger", -0.1, "0 or more seconds"),
    ("linger", NAN, "0 or more seconds"),
    ("linger", FOREVER, "0 or more seconds"),
    ("max_concurrent_batches", 0, "at least 1"),
    ("max_outstanding", 0, "at least 1"),
    ("when_full", "drop", "'block' or 'raise'"),
    ("when_full", None, "'block' or 'raise'"),
    ("submit_timeout", -1, "0 or more seconds"),
    ("submit_timeout", FOREVER, "0 or more seconds and at most"),
    ("delivery_timeout", 0, "more than 0 seconds"),
    ("delivery_timeout", -1, "more than 0 seconds"),
    ("delivery_timeout", NAN, "more than 0 seconds"),
    ("delivery_timeout", FOREVER, "more than 0 seconds and at most"),
    ("history", -1, "at least 0"),
    ("history_ttl", 0, "more than 0 seconds"),
    ("history_ttl", FOREVER, "more than 0 seconds and at most"),
    ("name", "", "leave it out"),
]

TOGETHER = [
    ({"linger": 20}, ["linger=20", "below delivery_timeout=20.0"]),
    ({"linger": 1, "delivery_timeout": 0.5}, ["linger=1", "below delivery_timeout=0.5"]),
]


@pytest.mark.parametrize("options", GOOD, ids=named)
def test_a_good_option_is_taken(options: dict[str, Any]) -> None:
    batcher = MicroBatcher(FaultyProcessor(), **options)
    for name, value in options.items():
        assert getattr(batcher.options, name) == value


@pytest.mark.parametrize(("option", "value", "remedy"), BAD_TYPES, ids=named)
def test_a_value_of_a_wrong_type_is_refused_by_name_with_its_remedy(option: str, value: Any, remedy: str) -> None:
    with pytest.raises(TypeError) as caught:
        MicroBatcher(FaultyProcessor(), **{option: value})
    assert option in str(caught.value)
    assert repr(value) in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("option", "value", "remedy"), BAD_VALUES, ids=named)
def test_a_wrong_value_is_refused_by_name_with_its_remedy(option: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=option) as caught:
        MicroBatcher(FaultyProcessor(), **{option: value})
    assert value == "" or repr(value) in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("options", "words"), TOGETHER, ids=named)
def test_options_that_contradict_each_other_are_refused_with_both_named(
    options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="must be below") as caught:
        MicroBatcher(FaultyProcessor(), **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_bad_retry_policy_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="max_attempts"):
        MicroBatcher(FaultyProcessor(), retry=RetryPolicy(max_attempts=0))


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="batch_size"):
        MicroBatcher(FaultyProcessor(), batch_size=5)  # type: ignore[call-arg]


def test_all_but_the_processor_is_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        MicroBatcher(FaultyProcessor(), 100)  # type: ignore[misc]


def test_the_defaults_are_the_ones_of_the_contract() -> None:
    options = MicroBatcher(FaultyProcessor())._core.options
    assert options == Options()
    assert options == Options(
        max_batch_size=100,
        linger=0.0,
        max_concurrent_batches=1,
        max_outstanding=10_000,
        when_full="block",
        submit_timeout=5.0,
        delivery_timeout=20.0,
        retry=RetryPolicy(max_attempts=None, backoff=0.05, backoff_max=2.0, retry_on=None),
        queue=MemoryQueue,
        history=10_000,
        history_ttl=300.0,
        name="microbatch",
    )


class NoProcess:
    process = "not callable"


class NoClose:
    close = 5

    def process(self, batch: object) -> None: ...


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (None, r"must have a method process\(batch\) or be a function, not None"),
        ("work", "must have a method process"),
        (NoProcess(), "must have a method process"),
        (int, "must have a method process"),
        (NoClose(), "close of processor .* must be a method, not 5"),
    ],
)
def test_what_is_no_processor_is_refused_at_once(processor: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MicroBatcher(processor)


# The environment.


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("MAX_BATCH_SIZE", "500", "max_batch_size", 500),
        ("LINGER", "0.005", "linger", 0.005),
        ("MAX_CONCURRENT_BATCHES", "4", "max_concurrent_batches", 4),
        ("MAX_OUTSTANDING", " 50 ", "max_outstanding", 50),
        ("WHEN_FULL", "raise", "when_full", "raise"),
        ("SUBMIT_TIMEOUT", "1e-1", "submit_timeout", 0.1),
        ("DELIVERY_TIMEOUT", "25", "delivery_timeout", 25.0),
        ("HISTORY", "0", "history", 0),
        ("HISTORY_TTL", "60", "history_ttl", 60.0),
        ("NAME", "payments", "name", "payments"),
        ("NAME", "none", "name", "none"),
        ("RETRY", "none", "retry", None),
        ("RETRY", "None", "retry", None),
        ("RETRY_MAX_ATTEMPTS", "3", "retry", RetryPolicy(max_attempts=3)),
        ("RETRY_MAX_ATTEMPTS", "none", "retry", RetryPolicy(max_attempts=None)),
        ("RETRY_BACKOFF", "0.5", "retry", RetryPolicy(backoff=0.5)),
        ("RETRY_BACKOFF_MAX", "9", "retry", RetryPolicy(backoff_max=9.0)),
    ],
)
def test_every_scalar_option_has_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, option: str, value: Any
) -> None:
    monkeypatch.setenv(f"MICROBATCH_{variable}", text)
    batcher = MicroBatcher.from_env(FaultyProcessor())
    assert getattr(batcher._core.options, option) == value


def test_no_scalar_option_is_left_out() -> None:
    spelled = {
        **dict.fromkeys(("MAX_BATCH_SIZE", "MAX_CONCURRENT_BATCHES", "MAX_OUTSTANDING", "HISTORY"), "7"),
        **dict.fromkeys(("LINGER", "SUBMIT_TIMEOUT", "DELIVERY_TIMEOUT", "HISTORY_TTL"), "7"),
        "WHEN_FULL": "block",
        "NAME": "x",
        "RETRY": "none",
    }
    found = options_from_env("M_", {f"M_{name}": text for name, text in spelled.items()})
    assert set(found) == set(Options.__slots__) - {"queue"}


def test_none_is_none_where_none_is_possible() -> None:
    environ = {"MICROBATCH_DELIVERY_TIMEOUT": "NONE", "MICROBATCH_RETRY": "none"}
    assert options_from_env("MICROBATCH_", environ) == {"delivery_timeout": None, "retry": None}


def test_the_numbers_of_the_retry_policy_go_together() -> None:
    environ = {
        "MICROBATCH_RETRY_MAX_ATTEMPTS": "5",
        "MICROBATCH_RETRY_BACKOFF": "0.1",
        "MICROBATCH_RETRY_BACKOFF_MAX": "1",
    }
    assert options_from_env("MICROBATCH_", environ) == {"retry": RetryPolicy(5, 0.1, 1.0)}


@pytest.mark.parametrize("variable", ["MAX_BATCH_SIZE", "DELIVERY_TIMEOUT", "RETRY", "BATCH_SIZE", "NAME"])
@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_variable_is_unset(variable: str, text: str) -> None:
    assert options_from_env("MICROBATCH_", {f"MICROBATCH_{variable}": text}) == {}


@pytest.mark.parametrize(
    ("variable", "text", "kind"),
    [
        ("MAX_BATCH_SIZE", "many", "is not a whole number"),
        ("MAX_BATCH_SIZE", "1.5", "is not a whole number"),
        ("MAX_BATCH_SIZE", "none", "is not a whole number"),
        ("LINGER", "5ms", "is not a number"),
        ("LINGER", "none", "is not a number"),
        ("RETRY_BACKOFF", "none", "is not a number"),
        ("HISTORY", "1e3", "is not a whole number"),
        ("RETRY", "3", "only 'none' is possible; see MICROBATCH_RETRY_MAX_ATTEMPTS"),
    ],
)
def test_a_text_that_is_no_such_value_is_an_error_that_names_variable_and_text(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, kind: str
) -> None:
    monkeypatch.setenv(f"MICROBATCH_{variable}", text)
    with pytest.raises(ValueError, match=f"MICROBATCH_{variable}={text!r}") as caught:
        MicroBatcher.from_env(FaultyProcessor())
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MAX_BATCH_SIZE", "0", "MICROBATCH_MAX_BATCH_SIZE must be at least 1, not 0"),
        ("LINGER", "nan", "MICROBATCH_LINGER must be 0 or more seconds"),
        ("WHEN_FULL", "drop", "MICROBATCH_WHEN_FULL must be 'block' or 'raise', not 'drop'"),
        ("RETRY_BACKOFF", "-1", "MICROBATCH_RETRY_BACKOFF=-1.0: backoff must be 0 or more finite seconds, not -1.0"),
        ("RETRY_MAX_ATTEMPTS", "0", "MICROBATCH_RETRY_MAX_ATTEMPTS=0: max_attempts must be at least 1, not 0"),
    ],
)
def test_a_value_from_the_environment_is_checked_like_any_other(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, message: str
) -> None:
    monkeypatch.setenv(f"MICROBATCH_{variable}", text)
    with pytest.raises(ValueError, match=message):
        MicroBatcher.from_env(FaultyProcessor())


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MAX_BATCHSIZE", "MAX_BATCH_SIZE"),
        ("MAXBATCHSIZE", "MAX_BATCH_SIZE"),
        ("BATCH_SIZE", "MAX_BATCH_SIZE"),
        ("max_batch_size", "MAX_BATCH_SIZE"),
        ("TIMEOUT", "LINGER"),
        ("INTERVAL", "LINGER"),
        ("BATCH_FREQUENCY", "LINGER"),
        ("LINGERS", "LINGER"),
        ("WORKERS", "MAX_CONCURRENT_BATCHES"),
        ("MAX_OUSTANDING", "MAX_OUTSTANDING"),
        ("WHENFULL", "WHEN_FULL"),
        ("SUBMIT_TIME_OUT", "SUBMIT_TIMEOUT"),
        ("DELIVERY_TIMEOUTS", "DELIVERY_TIMEOUT"),
        ("HISTROY", "HISTORY"),
        ("HISTORYTTL", "HISTORY_TTL"),
        ("MAX_RETRIES", "RETRY_MAX_ATTEMPTS"),
        ("RETRY_BACK_OFF", "RETRY_BACKOFF"),
    ],
)
def test_a_name_that_is_nearly_an_option_is_an_error_that_says_which(variable: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=f"MICROBATCH_{variable} is no option; did you mean MICROBATCH_{meant}"
    ) as caught:
        options_from_env("MICROBATCH_", {f"MICROBATCH_{variable}": "1"})
    assert str(caught.value).endswith(f"MICROBATCH_{meant}?")


@pytest.mark.parametrize(
    "variable",
    [
        "MICROBATCH_TEST_DSN",
        "MICROBATCH_CI",
        "MICROBATCH_MODEL_EXAMPLES",
        "MICROBATCH_PG_BIN",
        "MICROBATCH_DSN",
        "MICROBATCHES",
        "OTHER_MAX_BATCHSIZE",
        "MAX_BATCH_SIZE",
    ],
)
def test_other_variables_do_not_disturb(variable: str) -> None:
    assert options_from_env("MICROBATCH_", {variable: "7"}) == {}


def test_the_word_none_contradicts_numbers_for_the_same_policy() -> None:
    with pytest.raises(ValueError, match="MICROBATCH_RETRY=none contradicts the other MICROBATCH_RETRY_"):
        options_from_env("MICROBATCH_", {"MICROBATCH_RETRY": "none", "MICROBATCH_RETRY_BACKOFF": "1"})


def test_a_keyword_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROBATCH_MAX_BATCH_SIZE", "500")
    monkeypatch.setenv("MICROBATCH_LINGER", "0.5")
    monkeypatch.setenv("MICROBATCH_RETRY", "none")
    policy = RetryPolicy(max_attempts=2)
    options = MicroBatcher.from_env(FaultyProcessor(), max_batch_size=7, retry=policy, queue=queue.Queue)._core.options
    assert (options.max_batch_size, options.linger, options.retry) == (7, 0.5, policy)


def test_the_prefix_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYMENTS_MAX_BATCH_SIZE", "7")
    monkeypatch.setenv("MICROBATCH_MAX_BATCH_SIZE", "8")
    assert MicroBatcher.from_env(FaultyProcessor(), prefix="PAYMENTS_")._core.options.max_batch_size == 7


def test_a_subclass_makes_one_of_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROBATCH_MAX_BATCH_SIZE", "3")
    batcher = InlineBatcher.from_env(FaultyProcessor())
    assert type(batcher) is InlineBatcher
    assert batcher._core.options.max_batch_size == 3
