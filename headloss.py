"""
Cross-entropy over a large vocabulary in little memory, for where no compiler fuses it: eager runs, and CPUs above all.
"""

import math

import torch

LONGEST_SUM = {"mps": 2**14}  # M1 and M2 add up 32,767 or more wrongly until torch 2.14 (pytorch issues 177116, 195163)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the tied head, a few rows at a time: (B*T, V) logits or gradients never exist.

    The gradients are made together with the loss, while a slice of logits is in the cache, and wait for `backward`.
    x (N, C), weight (V, C), targets (N,) with -100 for none, n_tokens <= V -> scalar.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_tokens, rows, needs_grad):
        on = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if on else x.dtype
        x_low, w_low = x.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        width = LONGEST_SUM.get(x.device.type, len(weight))
        grad_x = torch.empty_like(x_low) if needs_grad else None
        grad_w = torch.zeros_like(weight) if needs_grad else None
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            target, valid = targets[part, None].clamp(min=0), targets[part, None] >= 0
            logits = torch.mm(x_low[part], w_low.t()).float()  # (rows, V)
            logits[:, n_tokens:] = -math.inf
            log_z = logits.logsumexp(dim=1, keepdim=True)
            loss += ((log_z - logits.gather(1, target)) * valid).sum()
            if needs_grad:  # d loss / d logits = softmax - one_hot
                grad = logits.sub_(log_z).exp_()
                grad.scatter_add_(1, target, -torch.ones_like(log_z))
                grad = grad.mul_(valid).to(dtype)
                torch.mm(grad[:, :width], w_low[:width], out=grad_x[part])
                for column in range(width, len(weight), width):
                    columns = slice(column, column + width)
                    grad_x[part] += grad[:, columns] @ w_low[columns]
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
