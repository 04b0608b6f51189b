"""
The loss of the tied head, in less memory than train_gpt2.plain_loss: compiled the gradient takes the place of the
logits, and eager they never exist. An H200 is 1% faster for it and needs 6 GiB less (bench/RESULTS.md).
"""

import math

import torch
import torch.nn.functional as F

HEAD_ROWS = 2048  # at a time on a GPU; each takes 13 V bytes
LONGEST_SUM = {"mps": 2**14}  # M1 and M2 sum 32,767 or more terms wrongly until torch 2.14 (pytorch issue 177116)


def head_loss(x, weight, targets, n_tokens: int):
    """Summed cross-entropy of the tied head. x (N, C), weight (V, C), targets (N,) with -100 for none -> scalar."""
    if torch.compiler.is_compiling():
        padding = torch.where(torch.arange(len(weight), device=x.device) < n_tokens, 0.0, -math.inf)  # by the matmul
        parts = 1 + len(x) * len(weight) // 2**31  # more logits at a time would need 64-bit indices, which are slower
        chunks = zip(x.chunk(parts), targets.chunk(parts))
        return sum(CrossEntropy.apply(F.linear(rows, weight, padding), wanted) for rows, wanted in chunks)
    rows = 256 if x.device.type == "cpu" else HEAD_ROWS
    return HeadLoss.apply(x, weight, targets, n_tokens, rows, torch.is_grad_enabled())


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits (N, V), written for torch.compile: it makes one kernel of each pass.

    It keeps the logits and writes their gradient over them: 2 V bytes a token less than F.cross_entropy. keepdim is
    what lets Inductor find the largest and the sum in one read.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        values = logits.float()
        top = values.amax(dim=1, keepdim=True)
        log_z = top + (values - top).exp().sum(dim=1, keepdim=True).log()
        ctx.save_for_backward(logits, log_z, targets)
        picked = logits.gather(1, targets.clamp(min=0)[:, None]).float()
        return ((log_z - picked) * (targets >= 0)[:, None]).sum()

    @staticmethod
    def backward(ctx, grad_loss):
        logits, log_z, targets = ctx.saved_tensors
        one_hot = (torch.arange(logits.shape[1], device=logits.device) == targets[:, None]).float()
        grad = ((logits.float() - log_z).exp() - one_hot) * ((targets >= 0)[:, None] * grad_loss)
        return grad.to(logits.dtype), None


class HeadLoss(torch.autograd.Function):
    """For where no compiler fuses matmul and loss. A few rows at a time: (N, V) logits or gradients never exist.

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
