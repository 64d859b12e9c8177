"""Region merging (section 3.4): the class of an image from those of its regions, weighted by their areas."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class RegionMerger(nn.Module):
    """Averages the class probabilities of the regions of each image, larger regions counting more.

    ``P = sum_j a_j p_j``, where a is the softmax of ``sqrt(area) / tau`` over the image's regions.

    Parameters
    ----------
    tau : float
        Temperature, in pixels: 100 for the images of MVTec AD (700 to 1024 pixels), 50 for those of MTD. Small: the
        largest region decides; large: all count the same.

    Examples
    --------
    >>> import torch
    >>> p = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]])
    >>> RegionMerger(tau=100)(p, torch.tensor([900.0, 100.0]), torch.tensor([0, 0]))
    tensor([[0.3524, 0.2325, 0.4151]])
    """

    def __init__(self, tau: float = 100.0) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau: expected a positive number, got {tau}")
        self.tau = tau

    def forward(
        self, probs: Float[Tensor, "r c"], areas: Float[Tensor, " r"], image_id: Int[Tensor, " r"]
    ) -> Float[Tensor, "i c"]:
        """Merge.

        Parameters
        ----------
        probs : (R, C)
            Class probabilities of the regions.
        areas : (R,)
            Their areas in pixels, 0 for an image without anomaly.
        image_id : (R,)
            Which image each belongs to, from 0; the result has a row for each up to the largest, which is 0 where an
            image has no region.

        Raises
        ------
        ValueError
            If the lengths differ, there is no region, or an area is negative or not finite.
        """
        if not len(probs) == len(areas) == len(image_id) or not len(probs):
            raise ValueError(
                "probs, areas, image_id: expected equal numbers of regions, at least one, got "
                f"{len(probs)}, {len(areas)}, {len(image_id)}"
            )
        if not (areas.isfinite() & (areas >= 0)).all():
            raise ValueError(f"areas: expected finite numbers of 0 or more, got {areas.min().item()} for the smallest")
        logits = areas.to(probs.dtype).sqrt() / self.tau
        n = int(image_id.max()) + 1
        highest = logits.new_full((n,), -torch.inf).scatter_reduce(0, image_id, logits, "amax")
        weight = (logits - highest[image_id]).exp()
        total = weight.new_zeros(n).index_add(0, image_id, weight)
        weight = weight / total[image_id]
        return probs.new_zeros(n, probs.shape[1]).index_add(0, image_id, weight.unsqueeze(1) * probs)
