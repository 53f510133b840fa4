"""The checks that `train` makes, run before anything is written or sent; reports what only the nodes can check."""

import sys
from collections.abc import Sequence

from conadv_lab.config import Config
from conadv_lab.launch.profiles import Profile


def check(configs: Sequence[Config], profile: Profile, data_here: bool = True) -> None:
    """Check each config as `train` would with the profile's ranks.

    Args:
        configs: resolved.
        profile: where they will run.
        data_here: whether the data are visible from this machine.

    Raises:
        ValueError: `train` would reject one of them; nothing is sent then.
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
