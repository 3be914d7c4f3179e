from __future__ import annotations

import pytest

from service.fleet.options import read_arguments
from service.settings import SettingsError


def test_arguments_are_the_fleets_and_the_services_by_name() -> None:
    options, settings = read_arguments({"min_replicas": "2", "max_replicas": "4", "kv_memory": "1GiB", "model": "x"})
    assert (options.min_replicas, options.max_replicas, options.num_gpus) == (2, 4, 0)
    assert (settings.kv_memory, settings.model) == (1 << 30, "x")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 must be at least min_replicas=3"),
        ({"num_gpus": "x"}, "num_gpus: "),
        ({"kv_memory": "much"}, "--kv-memory=much is not possible"),
        ({"port": 8000}, "the address is the proxy's"),
        ({"kv_memry": "1GiB"}, "kv_memry is unknown"),
    ],
)
def test_what_is_not_possible_is_one_line(arguments: dict[str, object], part: str) -> None:
    with pytest.raises(SettingsError, match=part) as caught:
        read_arguments(arguments)
    assert "\n" not in str(caught.value)
