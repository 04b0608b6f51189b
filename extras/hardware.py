"""
How fast a device can be, for the MFU on the screen: bf16 FLOP/s by the makers' data sheets, and what a token takes.
"""

import torch

PEAK_TFLOPS = {  # dense
    "H200": 989, "GH200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def flops_per_token(shape, seq_len: int) -> int:
    """Of forward and backward: 6 per weight, and attention counted whole (Chowdhery et al. 2022, appendix B)."""
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    return 6 * (12 * L * C**2 + V * C) + 12 * L * C * seq_len


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one device, 0 for a card that is not in PEAK_TFLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = set(name.replace("-", " ").split())
    if words & ({"NVL", "Laptop", "Max", "D", "Ti", "MIG"} | ({"PCIe"} if "A100" not in words else set())):
        return 0.0  # similar names of other cards; all A100 are alike
    return next((value * 1e12 for card, value in PEAK_TFLOPS.items() if set(card.split()) <= words), 0.0)
