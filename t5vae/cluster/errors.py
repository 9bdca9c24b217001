"""What can go wrong between the hosts of a run."""

from t5vae.common.errors import UserError


class LostRankError(Exception):
    """Another process of the run ended, or does not answer.

    Attributes:
        requeue: whether it is for this rank to have the scheduler run the job again.
    """

    def __init__(self, text: str, *, requeue: bool):
        super().__init__(text)
        self.requeue = requeue


class UnhealthyError(UserError):
    """Some hosts of a job cannot train, while others can.

    Attributes:
        hosts: their names.
        is_first_healthy: whether this rank is the first of those on other hosts.
    """

    def __init__(self, text: str, hosts: list[str], *, is_first_healthy: bool):
        super().__init__(text)
        self.hosts = hosts
        self.is_first_healthy = is_first_healthy
