"""Alarms: what makes the other figures of a report worthless."""

from typing import Any

LEAST_USE = 0.1  # nats a token that a wrong code costs at least, where codes are used


def alarms(figures: dict[str, Any], intervals: dict[str, Any], n: dict[str, int]) -> dict[str, str]:
    """What is wrong with a space, beyond what chance explains, or with what it is measured on.

    Args:
        figures: metrics, and `controls` of the same names.
        intervals: of both, [low, high].
        n: how many of everything.

    Returns:
        A sentence under each name that applies:

        - latent_use: a wrong code costs less than 0.1 nats a token: posterior collapse (Bowman et
          al., arXiv 1511.06349). What it writes is the decoder's own.
        - novelty: a smaller share of the valid samples is new than of a trigram model's: the
          training set, repeated.
        - validity: no more samples pass than of a trigram model's.
        - contamination: held-out sequences are in the training set too.
    """
    found = {}
    if n["contaminated"]:
        found["contamination"] = (
            f"{n['contaminated']:,} of {n['held_out']:,} held-out sequences are in the training "
            "set too, so no figure of held-out data holds: build the shards again and train anew"
        )
    if intervals["shuffled_gap"][0] < LEAST_USE:
        found["latent_use"] = (
            f"posterior collapse: another sequence's code costs {figures['shuffled_gap']:.3f} nats "
            "a token, so the decoder ignores the code"
        )
    if intervals["novel"][1] < intervals["controls"]["trigram"]["novel"][0]:
        found["novelty"] = (
            f"memorisation: {figures['novel']:.1%} of the valid samples are new, of a trigram "
            f"model's {figures['controls']['trigram']['novel']:.1%}"
        )
    if figures["valid"] is not None and (
        intervals["valid"][0] <= intervals["controls"]["trigram"]["valid"][1]
    ):
        found["validity"] = (
            f"no better than chance: {figures['valid']:.1%} of the samples pass, of a trigram "
            f"model's {figures['controls']['trigram']['valid']:.1%}"
        )
    return found
