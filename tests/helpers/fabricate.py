"""Checkpoints as their publishers save them, with whatever numbers a test wants: written, never downloaded."""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def torch_file(value: Any, old: bool = False) -> bytes:
    """``torch.save``'s bytes: the zip archive, or the stream of before PyTorch 1.6."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


@contextmanager
def modules(**contents: Mapping[str, Any]) -> Iterator[None]:
    """Modules that exist only while a pickle that names them is written."""
    before = dict(sys.modules)
    try:
        for name, attributes in contents.items():
            name = name.replace("__", ".")
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
            for key, value in attributes.items():
                setattr(sys.modules[name], key, value)
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in {n.split("__")[0] for n in contents}:
                del sys.modules[name]


def as_module(
    state: Mapping[str, Tensor], kind: type[nn.Module] = nn.Module, buffers: tuple[str, ...] = ()
) -> nn.Module:
    """A tree of modules that has this state dict.

    Args:
        kind: class of every module in it.
        buffers: endings of names that are buffers and no parameters.
    """
    root = kind()
    for name, value in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, kind())
            node = node._modules[part]
        if last in buffers or not value.is_floating_point():
            node.register_buffer(last, value)
        else:
            node.register_parameter(last, nn.Parameter(value, requires_grad=False))
    return root


def nvidia_pickle(state: Mapping[str, Tensor]) -> bytes:
    """NVIDIA's ``.pkl``: persistent modules with their source code, the generator under ``G_ema``."""

    def reconstruct(meta):
        raise AssertionError("the file's code was called")

    reconstruct.__name__ = reconstruct.__qualname__ = "_reconstruct_persistent_obj"
    reconstruct.__module__ = "torch_utils.persistence"

    class EasyDict(dict):
        pass

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"

    class Persistent(nn.Module):
        def __reduce__(self):
            own = dict(self.__dict__) | {"_init_args": (), "_init_kwargs": EasyDict(z_dim=512)}
            meta = {
                "type": "class",
                "version": 6,
                "module_src": "raise SystemExit\n",
                "class_name": "Generator",
                "state": own,
            }
            return reconstruct, (meta,), None

    with modules(
        torch_utils__persistence={"_reconstruct_persistent_obj": reconstruct}, dnnlib__util={"EasyDict": EasyDict}
    ):
        generator = as_module(state, Persistent, ("w_avg", "resample_filter", "noise_const"))
        value = {
            "G": None,
            "D": None,
            "G_ema": generator,
            "augment_pipe": None,
            "training_set_kwargs": EasyDict(path="x"),
        }
        return pickle.dumps(value)


def whole_module(state: Mapping[str, Tensor], old: bool) -> bytes:
    """A file of ``torch.save(module)``: the class is named in it, and would be imported."""

    class ResNet(nn.Module):
        pass

    ResNet.__module__, ResNet.__qualname__ = "arcface_models.resnet", "ResNet"
    with modules(arcface_models__resnet={"ResNet": ResNet}):
        return torch_file(as_module(state, ResNet, ("running_mean", "running_var")), old)


def e4e_file(encoder: Mapping[str, Tensor], latent_avg: Tensor, decoder: Mapping[str, Tensor] | None = None,
             namespace: bool = False, size: int = 1024) -> bytes:  # fmt: skip
    """``e4e_ffhq_encode.pt``: state_dict with both prefixes, latent_avg, the options of the training."""
    options = {"stylegan_size": size, "encoder_type": "Encoder4Editing", "start_from_latent_avg": True}
    state = OrderedDict((f"encoder.{k}", v) for k, v in encoder.items())
    state.update((f"decoder.{k}", v) for k, v in (decoder or {}).items())
    opts = argparse.Namespace(**options) if namespace else options
    return torch_file({"state_dict": state, "latent_avg": latent_avg, "opts": opts})
