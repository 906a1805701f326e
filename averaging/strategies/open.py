"""The strategy that a config names."""

from importlib import import_module
from typing import Any

from averaging.config import Averaging
from averaging.strategies.strategy import Strategy

CLASSES = {"collaborative": "Collaborative", "local_sgd": "LocalSGD", "diloco": "DiLoCo", "gossip": "Gossip"}


def open_strategy(config: Averaging, **options: Any) -> Strategy:
    """The strategy of `config`; `options` are the other arguments of `Strategy`."""
    module = import_module(f"averaging.strategies.{config.strategy}")
    strategy: Strategy = getattr(module, CLASSES[config.strategy])(config=config, **options)
    return strategy
