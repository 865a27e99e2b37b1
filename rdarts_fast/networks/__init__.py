"""The networks: candidate operations, cells, the supernet that is searched and the network a
genotype stands for.
"""

from rdarts_fast.networks.discrete import Network, auxiliary_fits
from rdarts_fast.networks.search_network import SearchNetwork, softmax_weights
from rdarts_fast.networks.supernet import BACKENDS, Supernet
from rdarts_fast.networks.trained_network import TrainedNetwork

__all__ = [
    "BACKENDS",
    "Network",
    "SearchNetwork",
    "Supernet",
    "TrainedNetwork",
    "auxiliary_fits",
    "softmax_weights",
]
