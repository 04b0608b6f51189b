"""
Muon for a transformer's block matrices, fused AdamW for all the rest: one optimizer, one state, one step.

Muon (Jordan et al. 2024) moves a matrix along the orthogonal factor of its gradient's running mean: U V^T, where that
mean is U S V^T. All singular directions advance by the same length, and not the few that dominate most of all.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

# The odd polynomials a x + b x^3 + c x^5 whose composition is nearest to 1 on [0.001, 1] (Amsel et al. 2025, "The Polar
# Express"): these five take singular values from there to 0.876 ... 1.124, where the one of Jordan et al., five times
# over, takes them to 0.47 ... 1.20. All but the last see x / 1.01: rounding to bfloat16 lifts some values over the
# end of their domain, where they grow fast: without it we saw values of 1.6.
OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLYNOMIALS = [(a / s, b / s**3, c / s**5) for (a, b, c), s in zip(OPTIMAL, (1.01, 1.01, 1.01, 1.01, 1.0))]
SPLIT = {"c_attn.weight": 3}  # queries, keys and values are three maps, that share a tensor for speed only
LARGEST = 2**26  # elements that are orthogonalized at a time: a bound on the temporaries


def orthogonalize(stack: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(k, m, n) matrices, m <= n -> (k, m, n) in `dtype`: near to the U V^T of each, and 0 of one that is 0.

    A Newton-Schulz iteration: an odd polynomial of a matrix acts on its singular values and leaves U and V alone.
    """
    norm = torch.linalg.matrix_norm(stack, keepdim=True).clamp(min=torch.finfo(stack.dtype).tiny)
    x = (stack / (1.01 * norm)).to(dtype)  # no singular value is above 1
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT  # (k, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize_together(stack: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`orthogonalize`, of which every rank does its share and gets the others'. All have the same stack, and get it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    share = -(-len(stack) // ranks)
    mine = torch.zeros(share, *stack.shape[1:], dtype=dtype, device=stack.device)
    part, size = stack[rank * share : (rank + 1) * share], max(1, LARGEST // stack[0].numel())
    for first in range(0, len(part), size):
        mine[first : min(first + size, len(part))] = orthogonalize(part[first : first + size], dtype)
    if ranks == 1:
        return mine
    everyones = mine.new_empty(ranks * share, *stack.shape[1:])
    dist.all_gather(list(everyones.chunk(ranks)), mine)
    return everyones[: len(stack)]


def lay(matrices: Iterable[torch.Tensor], parts: int) -> list[torch.Tensor]:
    """Views of (m, n) matrices, cut into `parts` by rows, and each on its side: no taller than wide."""
    cut = [part for matrix in matrices for part in matrix.chunk(parts)]
    return [part if part.shape[0] <= part.shape[1] else part.mT for part in cut]


class Muon(torch.optim.AdamW):
    """Muon on the groups that name their `parts`, fused AdamW on the others.

    A Muon group is a stack: its matrices, laid, have one shape. Its momentum is one tensor (k, m, n), kept with the
    group's first parameter. Its learning rate is group["lr"] * group["lr_ratio"], so that one schedule sets both. An
    update has the RMS that AdamW's have, 0.2 of the rate (Liu et al. 2025), whatever the shape; decay is AdamW's, too.
    Like the fused kernels it looks at `self.found_inf`, and leaves everything as it was if that is 1. `step` consumes
    the gradients of Muon's groups. dtype: of the iteration.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **settings):
        super().__init__(groups, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if "parts" in group:
                self._step_stack(group, None if found_inf is None else found_inf.bool())
        super().step()  # on whoever still has a gradient

    def _step_stack(self, group: dict, skip: torch.Tensor | None) -> None:
        """One update of a group; `skip`, a bool on the device, is applied and never read: no wait for the device."""
        parameters, momentum, rate = group["params"], group["momentum"], group["lr"] * group["lr_ratio"]
        grad = torch.stack(lay([p.grad for p in parameters], group["parts"]))  # (k, m, n)
        for parameter in parameters:
            parameter.grad = None
        state, decay = self.state[parameters[0]], rate * group["weight_decay"]
        if not state:  # AdamW's loading looks for a count of steps in every state
            state.update(step=grad.new_zeros(()), momentum=torch.zeros_like(grad))
        before = state["momentum"]
        mean = before.lerp(grad, 1 - momentum)
        ahead = grad.lerp_(mean, momentum)  # Nesterov
        if skip is not None:
            mean, ahead, decay = torch.where(skip, before, mean, out=mean), ahead.masked_fill_(skip, 0), decay * ~skip
        state["momentum"] = mean
        del before, mean, grad  # the stack is large, and what follows needs room
        state["step"] += 1 if skip is None else ~skip
        update = orthogonalize_together(ahead, self.dtype)
        weights = lay(parameters, group["parts"])
        torch._foreach_mul_(weights, 1 - decay)
        torch._foreach_add_(weights, update.unbind(), alpha=-0.2 * math.sqrt(max(update.shape[1:])) * rate)


def make_muon(named_parameters, muon_lr: float, momentum: float, weight_decay: float, dtype, **settings) -> Muon:
    """Muon on the matrices of GPT-2's blocks, AdamW on embeddings and vectors; only the vectors are not decayed."""
    stacks, others = {}, {2: [], 1: []}
    for name, parameter in named_parameters:
        if ".h." in name and parameter.dim() == 2:
            parts = SPLIT.get(".".join(name.split(".")[-2:]), 1)
            stacks.setdefault((parts, *sorted(parameter.shape)), []).append(parameter)
        else:
            others[parameter.dim()].append(parameter)
    muon = {"momentum": momentum, "lr_ratio": muon_lr / settings["lr"], "weight_decay": weight_decay}
    groups = [{"params": stack, "parts": key[0], **muon} for key, stack in stacks.items()]
    groups += [{"params": others[2], "weight_decay": weight_decay}, {"params": others[1], "weight_decay": 0.0}]
    return Muon(groups, dtype, **settings)
