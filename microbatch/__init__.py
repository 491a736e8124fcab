"""Micro-batching for synchronous Python: submit a job, get a Future, share one transaction."""

from .batcher import MicroBatcher
from .errors import (
    BatcherClosed,
    DeliveryTimeout,
    ForkedError,
    JobNotFound,
    MicrobatchError,
    MissingExtra,
    OutcomeUnknown,
    ProcessorContractError,
    QueueFull,
    ThreadsUnavailable,
    WorkerDied,
)
from .events import (
    BatchCompleted,
    BatcherShutDown,
    BatchFailed,
    BatchStarted,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRetrying,
    JobSubmitted,
)
from .job import JobFuture, JobStatus
from .protocols import Batch, BatchProcessor, JobQueue
from .queues import MemoryQueue
from .retry import RetryPolicy
from .stats import ShutdownReport, Stats

__all__ = [  # noqa: RUF022 - grouped as a user meets them
    # the batcher
    "MicroBatcher",
    "JobFuture",
    "JobStatus",
    "RetryPolicy",
    "ShutdownReport",
    "Stats",
    # what you may bring
    "Batch",
    "BatchProcessor",
    "JobQueue",
    "MemoryQueue",
    # errors
    "MicrobatchError",
    "BatcherClosed",
    "QueueFull",
    "ThreadsUnavailable",
    "DeliveryTimeout",
    "JobNotFound",
    "MissingExtra",
    "OutcomeUnknown",
    "ProcessorContractError",
    "ForkedError",
    "WorkerDied",
    # events
    "JobSubmitted",
    "JobRetrying",
    "JobCompleted",
    "JobFailed",
    "JobCancelled",
    "BatchStarted",
    "BatchCompleted",
    "BatchFailed",
    "BatcherShutDown",
]
