"""Reads what a scrape says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """The numbers by name and label values; without buckets, times of creation, prefix and the batcher's name."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for label, value in sorted(sample.labels.items()) if label != "batcher"]
            if "le" not in sample.labels and not sample.name.endswith("_created"):
                found[(sample.name.removeprefix("microbatch_"), *labels)] = sample.value
    return found
