"""
The loss of the tied head without its logits, for where no compiler fuses the two.
"""

import math

import torch

HEAD_ROWS = 2048  # at a time on a GPU; each takes 13 V bytes
LONGEST_SUM = {"mps": 2**14}  # M1 and M2 sum 32,767 or more terms wrongly until torch 2.14 (pytorch issue 177116)


def head_loss(x, weight, targets, n_tokens: int):
    """Summed cross-entropy of the tied head. x (N, C), weight (V, C), targets (N,) with -100 for none -> scalar."""
    rows = 256 if x.device.type == "cpu" else HEAD_ROWS
    return HeadLoss.apply(x, weight, targets, n_tokens, rows, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """A few rows at a time: (N, V) logits or gradients never exist.

    The gradients are made together with the loss, while a slice of logits is in the cache, and wait for `backward`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_tokens, rows, needs_grad):
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        x_low, w_low = x.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x, grad_w = (torch.empty_like(x_low), torch.zeros_like(weight)) if needs_grad else (None, None)
        width = LONGEST_SUM.get(x.device.type, len(weight))
        for part in (slice(first, first + rows) for first in range(0, len(x), rows)):
            target, valid = targets[part, None].clamp(min=0), targets[part, None] >= 0
            logits = torch.mm(x_low[part], w_low.t()).float()  # (rows, V)
            logits[:, n_tokens:] = -math.inf
            log_z = logits.logsumexp(dim=1, keepdim=True)
            loss += ((log_z - logits.gather(1, target)) * valid).sum()
            if needs_grad:  # d loss / d logits = softmax - one_hot
                grad = logits.sub_(log_z).exp_()
                grad.scatter_add_(1, target, -torch.ones_like(log_z))
                grad = grad.mul_(valid).to(dtype)
                grad_x[part] = sum(g @ w for g, w in zip(grad.split(width, dim=1), w_low.split(width)))
                if dtype == weight.dtype:
                    grad_w.addmm_(grad.t(), x_low[part])
                else:
                    grad_w += grad.t() @ x_low[part]
        if needs_grad:
            ctx.save_for_backward(grad_x.to(x.dtype), grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_w.mul_(grad_loss), None, None, None, None
