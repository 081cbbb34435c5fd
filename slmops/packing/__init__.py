"""How do many adapters and one quantized base become one package? `pack` is the verb."""

from slmops.packing.assembling import pack

__all__ = ["pack"]
