"""The same check as `train`'s, before anything is written or sent; what only the nodes can see is told."""

import sys
from collections.abc import Sequence

from conadv_lab.config import Config
from conadv_lab.launch.profiles import Profile


def check(configs: Sequence[Config], profile: Profile, data_here: bool = True) -> None:
    """Look at each config as `train` would with the profile's ranks.

    Args:
        configs: resolved.
        profile: where they will run.
        data_here: whether this machine sees the data.

    Raises:
        ValueError: `train` would refuse one; nothing is sent then.
    """
    from conadv_lab.training.beforehand import Beforehand

    looked = Beforehand(
        profile.nodes * profile.tasks_per_node,
        here=profile.is_local,
        data_here=data_here,
        same_environment=profile.container is None and profile.python is None,
    )
    for config in configs:
        looked.check(config)
    for what in looked.unseen:
        print(f"not checked here: {what}", file=sys.stderr)
