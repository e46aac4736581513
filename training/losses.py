"""What a reconstruction is asked for: pixels, edges, texture of the right strength, no lattice, colours of areas."""

import torch
import torch.nn.functional as F

FACTOR = 8  # pixels a latent


def reconstruction_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """L1, a squared term for PSNR, and L1 of finite differences at three scales, which keeps edges crisp."""
    loss = F.l1_loss(got, want) + 2.0 * F.mse_loss(got, want)
    for scale in range(3):
        if scale:
            got, want = F.avg_pool2d(got, 2), F.avg_pool2d(want, 2)
        dx = (got[..., 1:] - got[..., :-1]) - (want[..., 1:] - want[..., :-1])
        dy = (got[..., 1:, :] - got[..., :-1, :]) - (want[..., 1:, :] - want[..., :-1, :])
        loss = loss + 0.5 * (dx.abs().mean() + dy.abs().mean())
    return loss


def laplacian(images: torch.Tensor) -> torch.Tensor:
    """Four-neighbour Laplacian of each channel: ``[B,C,H,W]`` to ``[B,C,H-2,W-2]``."""
    inner = images[..., 1:-1, 1:-1]
    around = images[..., 2:, 1:-1] + images[..., :-2, 1:-1] + images[..., 1:-1, 2:] + images[..., 1:-1, :-2]
    return around - 4 * inner


def texture_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How far the strength of the finest detail is off, square by square of eight pixels, whatever its phase.

    Means of what could be there are smooth; this asks for as much grain as the scene has there, and none where it is
    empty.
    """
    found, wanted = ((F.avg_pool2d(laplacian(x) ** 2, 8, 4) + 1e-4).sqrt() for x in (got, want))
    return F.l1_loss(found, wanted)


def steepness(images: torch.Tensor) -> torch.Tensor:
    """Mean step across the lines at each place in the square of a latent: ``[2, 8]``, columns and rows.

    Line 0 lies between two latents, line 4 in the middle of one. images ``[B,3,H,W]``, H and W multiples of 8.
    """
    across = (images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((0, 1, 3))
    found = []
    for steps in (across, down):  # entry i is the line before pixel i + 1
        place = torch.arange(1, len(steps) + 1, device=steps.device) % FACTOR
        sums = torch.zeros(FACTOR, device=steps.device, dtype=steps.dtype).index_add(0, place, steps)
        counts = torch.zeros(FACTOR, device=steps.device).index_add(0, place, torch.ones_like(steps))
        found.append(sums / counts)
    return torch.stack(found)


def lattice_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How unevenly the steepness of ``want`` is met over the places in a square: 0 when all are met alike."""
    share = steepness(got) / steepness(want).clamp_min(1e-4)
    return (share - share.mean(1, keepdim=True)).abs().mean() + (share[:, 0] - share[:, 1:].mean(1)).abs().mean()


def colour_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """L1 of the means of 32-pixel squares: colours of areas, whatever is drawn in them."""
    return F.l1_loss(F.avg_pool2d(got, 32), F.avg_pool2d(want, 32))
