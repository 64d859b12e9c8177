"""Image priors: smoothness, denoising and valid ranges for images that are optimised."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur every channel of images (N, C, H, W) with a Gaussian, cut at three deviations; edges are replicated."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    x = F.pad(x, [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels of images (N, C, H, W), one value per image (N,)."""
    down, right = x.diff(dim=-2).abs(), x.diff(dim=-1).abs()
    return down.flatten(1).mean(1) + right.flatten(1).mean(1)


def total_variation_bregman(x: Tensor, weight: float, max_iter: int = 100, eps: float = 1e-3) -> Tensor:
    """Denoise images (N, C, H, W) by isotropic total variation with split Bregman (Goldstein and Osher 2009).

    Equal to ``skimage.restoration.denoise_tv_bregman`` of one image at a time, channels together, its order of
    Gauss-Seidel sweeps included. A smaller weight denoises more (in Chambolle's form it is the other way round).

    Parameters
    ----------
    x : (N, C, H, W)
        Images, at least 2 pixels high and wide. The result depends on their scale: those of range 0..255 with weight w
        and tolerance eps behave as those of range 0..1 with 255 w and eps / 255.
    weight : float
        Half of the factor lambda of the squared distance to x, positive.
    max_iter : int
        Largest number of sweeps.
    eps : float
        An image is done when its root mean squared change in a sweep is at most eps.

    Raises
    ------
    ValueError
        If the shape, the weight or max_iter does not fit.

    Notes
    -----
    A pixel may be visited once those above and left of it have been visited in the same sweep and those below and right
    of it in the one before. So at time t sweep k is at the anti-diagonal t - 2k: all sweeps run at once, each two
    diagonals behind the last, and every time is one tensor operation on the diagonals of one parity.
    """
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"x: expected images (N, C, H, W) of at least 2 x 2 pixels, got shape {tuple(x.shape)}")
    if not weight > 0 or max_iter < 1:
        raise ValueError(f"weight, max_iter: expected a positive number and at least 1, got {weight} and {max_iter}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    (_, c, h, w), scale = x.shape, 2 * weight  # multiplied by 2 weight, the image needs no weight in the iteration
    part = max(1, 2**26 // (c * (h + w) ** 2 * h))  # images of 28 pixels by the hundreds, large ones one by one
    denoised = [_sweep(images.to(dtype) * scale, max_iter, eps * scale) / scale for images in x.split(part)]
    return torch.cat(denoised).to(x.dtype)


def _sweep(x: Tensor, max_iter: int, eps: float) -> Tensor:
    n, c, h, w = x.shape
    diagonals, images, device = h + w - 1, n * c, x.device
    image = x.flatten(0, 1).permute(1, 2, 0)
    # a border of fixed pixels, reflected above and left, repeated below and right
    padded = x.new_zeros(h + 2, w + 2, images)
    padded[1:-1, 1:-1] = image
    padded[0, 1:-1], padded[-1, 1:-1] = image[1], image[-1]
    padded[1:-1, 0], padded[1:-1, -1] = image[:, 1], image[:, -1]
    # by diagonal and row: the neighbours below and right are in the next diagonal, those above and left in the last
    rows, columns = torch.arange(h + 2, device=device).view(-1, 1), torch.arange(w + 2, device=device)
    by_diagonal = x.new_zeros((h + w + 5) // 2 * 2, h + 2, images)
    by_diagonal[rows + columns, rows] = padded
    rows, columns = rows[1:-1], columns[1:-1]
    inside = x.new_zeros(len(by_diagonal), h + 2, 1)
    inside[rows + columns, rows] = 1
    inside = inside.expand_as(by_diagonal)
    data = by_diagonal * (1 - 8 / 9 * inside)
    inside, data = (part[:, 1:-1].unflatten(0, (-1, 2)).transpose(0, 1).contiguous() for part in (inside, data))
    visited = 2 / 9 * inside

    # what was written at the last times, to give each image as it was at the end of its own last sweep
    times = diagonals + 2 + diagonals % 2
    u = by_diagonal.unflatten(0, (-1, 2)).transpose(0, 1).repeat(times // 2, 1, 1, 1)
    half, tiny = inside.shape[1], x.new_tensor(1e-30)  # tiny: the square root of 0 is slow on some processors
    b, p = x.new_zeros(2, 2, half, h, images), x.new_zeros(2, 2, half, h + 2, images)  # p = d - b
    sums, ascents = x.new_empty(half, h, images), x.new_empty(2, half, h, images)
    last, result = image, image.clone()
    running = torch.ones(n, dtype=torch.bool, device=device)
    for t in range(2 * (max_iter - 1) + diagonals):
        parity = t % 2
        first = 1 + t // 2 - min(max_iter - 1, t // 2)
        end = 2 + t // 2 - max(0, (t - diagonals + 2) // 2)
        here, after = slice(first, end), slice(first + parity, end + parity)
        before = slice(first + parity - 1, end + parity - 1)
        others, old, new = u[(t - 1) % times], u[(t - 2) % times, here, 1:-1], u[t % times, here, 1:-1]
        right, down = others[after, 1:-1], others[after, 2:]
        left_p, up_p = p[1 - parity, 0, before, 1:-1], p[1 - parity, 1, before, :-2]
        own_b, own_p, own_inside = b[parity, :, here], p[parity, :, here, 1:-1], inside[parity, here]
        a, g = sums[here], ascents[:, here]
        torch.add(right, down, out=a)
        a.add_(others[before, 1:-1]).add_(others[before, :-2]).add_(left_p).add_(up_p).sub_(own_p[0]).sub_(own_p[1])
        torch.addcmul(data[parity, here], visited[parity, here], a, out=new)
        torch.sub(right, old, out=g[0])
        torch.sub(down, old, out=g[1])
        g.add_(own_b)
        # d = s / (s + 1) g and b = g - d with s = |g|; outside the image both stay 0
        torch.addcmul(tiny, g[0], g[0], out=a)
        a.addcmul_(g[1], g[1]).sqrt_().add_(1)
        torch.div(own_inside, a, out=a)
        torch.mul(g, a, out=own_b)
        torch.sub(own_inside, a, alpha=2, out=a)
        torch.mul(g, a, out=own_p)
        if t >= diagonals - 1 and (t - diagonals) % 2:
            k = (t - diagonals + 1) // 2
            swept = u[(2 * k + rows + columns - 2) % times, (rows + columns) // 2, rows]
            change = (swept - last).square_().mean((0, 1)).view(n, c).mean(1).sqrt()
            last = swept
            done = running & ((change <= eps) | (k == max_iter - 1))
            if done.any():
                result = torch.where(done.repeat_interleave(c), swept, result)
                running &= ~done
                if not running.any():
                    break
    return result.permute(2, 0, 1).reshape(n, c, h, w)


def laplacian_energy(x: Tensor) -> Tensor:
    """Mean squared response to a 3 x 3 Laplacian, per sample (N,), of stimuli (N, C, H, W) or (N, C, T, H, W).

    The kernel is [[.25, .5, .25], [.5, -3, .5], [.25, .5, .25]], on images padded by reflection of two pixels
    (Burg et al. 2024, authors' code); frames of a video count alike.
    """
    kernel = x.new_tensor([[0.25, 0.5, 0.25], [0.5, -3.0, 0.5], [0.25, 0.5, 0.25]])
    planes = x.reshape(len(x), -1, *x.shape[-2:])
    padded = F.pad(planes, [2, 2, 2, 2], mode="reflect").flatten(0, 1).unsqueeze(1)
    return F.conv2d(padded, kernel.view(1, 1, 3, 3)).pow(2).view(len(x), -1).mean(1)


@dataclass(frozen=True)
class NormClip:
    """Rescale each sample to a fixed L2 norm, then clip to the valid range (Burg et al. 2024, authors' code).

    Parameters
    ----------
    norm : float or None
        Norm over all values of a sample, channels together; None leaves the norm alone. A sample of zeros stays zero.
    low, high : float
        Valid range.
    """

    norm: float | None = None
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.norm is not None and not self.norm > 0:
            raise ValueError(f"norm must be positive, got {self.norm}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    def __call__(self, x: Tensor) -> Tensor:
        """Project x (N, ...)."""
        if self.norm is not None:
            size = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            x = torch.where(size > 0, x * (self.norm / size.clamp_min(1e-30)), x)
        return x.clamp(self.low, self.high)
