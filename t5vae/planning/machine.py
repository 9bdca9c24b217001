"""What a machine does in a second, as its makers' sheets have it or as a user says."""

import math
from dataclasses import dataclass, fields

from t5vae.common.errors import UserError
from t5vae.training.meter import PEAKS

LINKS = {
    "B200": 900e9,
    "H100 PCIe": 64e9,
    "H100": 450e9,
    "H200": 450e9,
    "GH200": 450e9,
    "A100": 300e9,
    "L40S": 32e9,
    "A40": 32e9,
    "L4": 32e9,
    "V100": 150e9,
    "MI300X": 448e9,
    "MI250X": 400e9,
}
"""Bytes a second that a device of `PEAKS` sends to the others of its node, one way: over NVLink or
Infinity Fabric in the boards that have it, else over PCIe, as the makers' sheets have them."""
DEVICES = {name.lower().replace(" ", "-"): name for name in PEAKS}
"""Devices of `PEAKS`, as they are typed."""
GIGABIT = 1e9 / 8  # bytes
GIGABYTE = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        peak: products of matrices that one rank's device computes at most; None where that is not
            known. A multiply-add is two.
        utilisation: share of the peak that it reaches while it computes.
        link: bytes that a rank sends to others of its node.
        network: bytes that a node sends to others, or has from a store.
        store: bytes that the store of the shards gives all nodes together.
        disk: bytes that the file system of the run's folder takes from all nodes together, or
            gives them.
    """

    peak: float | None
    utilisation: float
    link: float
    network: float
    store: float
    disk: float


@dataclass(frozen=True)
class Machine:
    """What is known of a machine, in the units that it is sold in.

    Attributes:
        device: of the accelerators, a key of `DEVICES`.
        tflops: 10^12 products a second of one rank's device at most; None takes the device's, and
            for a CPU there is none.
        utilisation: share of that which is reached while a rank computes: large language models
            had 0.21 to 0.46 of whole steps (Chowdhery et al., arXiv 2204.02311, table 3), and 0.44
            to 0.52 with what is computed again (Narayanan et al., arXiv 2104.04473, table 1).
        network: Gbit/s that a node sends, all its adapters together.
        store, disk: GB/s (10^9 bytes) of all nodes together, see `Rates`.
        price: dollars an hour of one rank's device; None where it is not known.
    """

    device: str = "h100"
    tflops: float | None = None
    utilisation: float = 0.4
    network: float = 400
    store: float = 10
    disk: float = 10
    price: float | None = None

    def rates(self, *, accelerated: bool, half: bool) -> Rates:
        """These in operations and bytes a second.

        Args:
            accelerated: on accelerators; ranks on CPUs are one a node, and have its network alone.
            half: in bf16 or fp16, else fp32: in TF32, half as fast on the sheets of those that have
                it.

        Raises:
            UserError: for a device that is not known, or a number that is not above 0.
        """
        for field in fields(self):
            given = getattr(self, field.name)
            if isinstance(given, int | float) and not 0 < given < math.inf:
                raise UserError(f"--{field.name} is {given:g}: give a number above 0")
        if self.device.lower() not in DEVICES:
            raise UserError(
                f"--device {self.device} is not known: choose {', '.join(DEVICES)}, or the one "
                "nearest to yours with --tflops"
            )
        name = DEVICES[self.device.lower()]
        peak = None if self.tflops is None else self.tflops * 1e12
        if peak is None and accelerated:
            peak = PEAKS[name] if half else PEAKS[name] / 2
        network = self.network * GIGABIT
        return Rates(
            peak=peak,
            utilisation=self.utilisation,
            link=LINKS[name] if accelerated else network,
            network=network,
            store=self.store * GIGABYTE,
            disk=self.disk * GIGABYTE,
        )
