"""How a global batch is dealt, and what is advised where it cannot be."""

import pytest

from t5vae.common.errors import UserError
from t5vae.config.running import BatchSplit, Data


def data(batch, micro=None):
    return Data(shards="somewhere", global_batch_size=batch, micro_batch_size=micro)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "dealt"),
    [
        (256, None, 8, (32, 1)),
        (4096, 64, 64, (64, 1)),
        (4096, 8, 128, (8, 4)),
        (4096, None, 1024, (4, 1)),
    ],
)
def test_a_batch_that_ranks_can_share_is_dealt(batch, micro, ranks, dealt):
    assert data(batch, micro).split(ranks) == BatchSplit(batch, ranks, *dealt)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "ways"),
    [
        (256, None, 3, ["data.global_batch_size=255", "data.global_batch_size=258"]),
        (2, None, 1024, ["data.global_batch_size=1024"]),
        # the batch stays where ranks divide it
        (4096, 64, 512, ["data.micro_batch_size=8", "data.global_batch_size=32768"]),
        (
            96,
            8,
            8,
            ["data.micro_batch_size=6", "data.global_batch_size=64", "data.global_batch_size=128"],
        ),
        # else the micro batch, if a rank's share is that large
        (4096, 8, 3, ["data.global_batch_size=4104", "data.global_batch_size=4080"]),
        (
            4096,
            64,
            192,
            [
                "data.global_batch_size=4032 data.micro_batch_size=21",
                "data.global_batch_size=12288",
            ],
        ),
        (
            64,
            64,
            1024,
            ["data.global_batch_size=1024 data.micro_batch_size=1", "data.global_batch_size=65536"],
        ),
    ],
)
def test_a_batch_that_they_cannot_is_refused_with_what_they_can(batch, micro, ranks, ways):
    own = data(batch, micro)
    with pytest.raises(UserError, match=f"cannot be dealt to {ranks} ranks") as caught:
        own.split(ranks)
    assert str(caught.value).endswith(f"; use {', or '.join(ways)}")
    for way in ways:
        new = dict(setting.removeprefix("data.").split("=") for setting in way.split())
        other = data(
            int(new.get("global_batch_size", batch)),
            int(new.get("micro_batch_size", micro or 0)) or None,
        )
        assert other.split(ranks) in own.fitting(ranks)
