"""Attacks on face recognisers that others use as protection: what this method is compared with.

One file each: ``mi_fgsm``, ``ti_dim``, ``tip_im``.  All take a picture and differentiable identity features (the
surrogates), change pixels within an L-infinity bound, and return an ``AttackResult``; none of them knows where a face
lies.  The identity inversion attack, which is part of the method, is ``scol_ops.attack``.
"""

from scol_ops.attacks.mi_fgsm import MIFGSMSettings, mi_fgsm
from scol_ops.attacks.ti_dim import TIDIMSettings, ti_dim
from scol_ops.attacks.tip_im import TIPIMSettings, tip_im

__all__ = ["MIFGSMSettings", "TIDIMSettings", "TIPIMSettings", "mi_fgsm", "ti_dim", "tip_im"]
