"""The fused kernels: each a public function, its plain torch twin and its derivatives."""

from rdarts_fast.kernels.channel_sums import channel_affine, channel_sums
from rdarts_fast.kernels.correlation import correlation
from rdarts_fast.kernels.mixing import mixing
from rdarts_fast.kernels.node_sum import Noise, node_sum, node_sum_dq, node_sum_dz
from rdarts_fast.kernels.normalized_sum import normalized_sum
from rdarts_fast.kernels.pool import Pooled, pools
from rdarts_fast.kernels.recurrent_node import recurrent_node
from rdarts_fast.kernels.sep_stage import sep_stage

__all__ = [
    "Noise",
    "Pooled",
    "channel_affine",
    "channel_sums",
    "correlation",
    "mixing",
    "node_sum",
    "node_sum_dq",
    "node_sum_dz",
    "normalized_sum",
    "pools",
    "recurrent_node",
    "sep_stage",
]
