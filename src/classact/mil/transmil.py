"""TransMIL: correlated multiple-instance learning with a Nystrom transformer.

Shao, Bian, Chen, Wang, Zhang, Ji, Zhang: TransMIL: Transformer based Correlated Multiple Instance Learning for Whole
Slide Image Classification, NeurIPS 2021, https://arxiv.org/abs/2106.00908. Code of the authors: szc19990412/TransMIL.

The bag is laid out as a square in its stored order (the first instances fill it up a second time), a class token is put
in front, and two layers of Nystrom attention (Xiong et al., AAAI 2021, https://arxiv.org/abs/2102.03902) with a
convolutional position encoding between them (PPEG) lead to the class token that is classified. The order of the
instances therefore matters, unlike in the rest of the family.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.attention import MultiHeadOutput, mean_attention_logits
from classact.mil.model import MILModel, check_bags, embedding_width


def iterative_pinv(a: Float[Tensor, "n h m m"], iterations: int = 6) -> Float[Tensor, "n h m m"]:
    """Approximate the Moore-Penrose inverse by matrix products alone (Xiong et al., eq. 11).

    The start is scaled by the largest row and column sum over the heads of a bag, so that a bag of a batch gets what
    it gets alone; the published implementations take them over the whole batch.

    Parameters
    ----------
    a : (N, H, M, M)
        Matrices of H heads of N bags.
    iterations : int
        Number of iterations.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[[[2.0, 0.0], [1.0, 4.0]]]])
    >>> torch.allclose(iterative_pinv(a, 20), torch.linalg.inv(a), atol=1e-5)
    True
    """
    rows, columns = (a.abs().sum(dim).amax((1, 2)) for dim in (-1, -2))
    z = a.transpose(-1, -2) / (rows * columns).view(-1, 1, 1, 1)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


class NystromAttention(nn.Module):
    """Multi-head self-attention through M landmarks, linear in the length (Xiong et al., eq. 13).

    The sequence is padded with zeros in front to a multiple of M; landmarks are means of neighbouring queries and
    keys. As in the published implementation the zeros take part in the attention. The product is evaluated from the
    right, ``softmax(q k~) (pinv (softmax(q~ k) v))``, so that no product of size L x M x M occurs.

    Parameters
    ----------
    dim : int
        Width D of the tokens, a multiple of `heads`.
    heads : int
        Number H of heads.
    landmarks : int
        Number M of landmarks.
    pinv_iterations : int
        Iterations of the pseudo-inverse.
    residual_kernel : int
        Odd length of the depthwise convolution over the tokens that is added to the values.
    dropout : float
        Dropout on the output projection.

    Examples
    --------
    >>> import torch
    >>> attend = NystromAttention(dim=16, heads=4, landmarks=8).eval()
    >>> y, row = attend(torch.randn(2, 21, 16), first_row=True)
    >>> y.shape, row.shape
    (torch.Size([2, 21, 16]), torch.Size([2, 4, 21]))
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        landmarks: int = 256,
        pinv_iterations: int = 6,
        residual_kernel: int = 33,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: expected a divisor of the embedding width {dim}, got {heads}")
        if landmarks < 1:
            raise ValueError(f"landmarks: expected at least 1, got {landmarks}")
        if pinv_iterations < 1:
            raise ValueError(f"pinv_iterations: expected at least 1, got {pinv_iterations}")
        if residual_kernel < 1 or residual_kernel % 2 == 0:
            raise ValueError(f"residual_kernel: expected an odd number, got {residual_kernel}")
        self.heads, self.landmarks, self.pinv_iterations = heads, landmarks, pinv_iterations
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.residual = nn.Conv2d(
            heads, heads, (residual_kernel, 1), padding=(residual_kernel // 2, 0), groups=heads, bias=False
        )
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "n l d"], first_row: bool = False
    ) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "n h l"] | None]:
        """Attend; with `first_row` also return how the first token attends to all, per head.

        The row is a product of three matrices, not a softmax: entries may be negative, and its sum is 1 only about.
        """
        length = x.shape[1]
        front = -length % self.landmarks
        x = F.pad(x, (0, 0, front, 0))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, H, L, D/H)
        q_landmarks, k_landmarks = (t.unflatten(2, (self.landmarks, -1)).mean(3) for t in (q, k))
        # the iteration multiplies up rounding errors: never in half precision
        with torch.autocast(x.device.type, enabled=False):
            precise = torch.promote_types(q.dtype, torch.float32)
            q_m, k_m = q_landmarks.to(precise), k_landmarks.to(precise)
            inverse = iterative_pinv(_attention(q_m, k_m), self.pinv_iterations)
        row = None
        if first_row:
            to_all = _attention(q_landmarks, k)
            gathered = to_all @ v
            first = _attention(q[:, :, front : front + 1], k_landmarks).to(precise) @ inverse
            row = (first.to(to_all.dtype) @ to_all)[:, :, 0, front:]
        else:
            gathered = F.scaled_dot_product_attention(q_landmarks, k, v)
        y = F.scaled_dot_product_attention(q, k_landmarks, (inverse @ gathered.to(precise)).to(q.dtype))
        y = (y + self.residual(v))[:, :, front:].transpose(1, 2).flatten(2)
        return self.dropout(self.out(y)), row


class PPEG(nn.Module):
    """Pyramid position encoding generator: depthwise convolutions of 7, 5 and 3 over the square, added to the tokens.

    The three kernels are summed first: one convolution instead of three.

    Parameters
    ----------
    dim : int
        Width D of the tokens.

    Examples
    --------
    >>> import torch
    >>> PPEG(8)(torch.randn(2, 1 + 9, 8)).shape
    torch.Size([2, 10, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in (7, 5, 3)
        )

    def forward(self, x: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """Encode the tokens behind the class token, which stays; there must be a square number of them."""
        token, x = x[:, :1], x[:, 1:]
        side = round(math.sqrt(x.shape[1]))
        if side * side != x.shape[1]:
            raise ValueError(f"x: expected a class token and a square number of tokens, got 1 + {x.shape[1]}")
        seven, five, three = self.seven, self.five, self.three
        weight = seven.weight + F.pad(five.weight, (1, 1, 1, 1)) + F.pad(three.weight, (2, 2, 2, 2))
        image = x.transpose(1, 2).unflatten(2, (side, side))
        bias = torch.stack([c.bias for c in (seven, five, three) if c.bias is not None]).sum(0)
        encoding = F.conv2d(image, weight, bias, padding=3, groups=image.shape[1])
        return torch.cat([token, (image + encoding).flatten(2).transpose(1, 2)], dim=1)


class TransMIL(MILModel):
    """Transformer-based correlated multiple-instance learning; train it with the cross-entropy of the bag.

    The attention in the output is that of the class token in the first layer, where a token still is an instance:
    negative weights of the Nystrom approximation count as 0, and an instance that fills up the square a second time
    gets the weight of both its tokens.

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width D of the tokens, a multiple of `heads`; 512 in the paper. Default: the family's
        [`embedding_width`][classact.mil.model.embedding_width].
    heads : int
        Number of attention heads.
    landmarks : int, optional
        Number of landmarks; half of `dim` by default, as in the paper.
    pinv_iterations : int
        Iterations of the pseudo-inverse.
    residual_kernel : int
        Length of the convolution over the values.
    dropout : float
        Dropout on the output projection of the attention.

    Examples
    --------
    >>> import torch
    >>> model = TransMIL(in_dim=384, n_classes=2).eval()
    >>> output = model(torch.randn(1, 500, 384))
    >>> output.logits.shape, output.attention_map_logits.shape
    (torch.Size([1, 2]), torch.Size([1, 8, 500]))
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        heads: int = 8,
        landmarks: int | None = None,
        pinv_iterations: int = 6,
        residual_kernel: int = 33,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            in_dim,
            n_classes,
            dim=dim,
            heads=heads,
            landmarks=landmarks,
            pinv_iterations=pinv_iterations,
            residual_kernel=residual_kernel,
            dropout=dropout,
        )
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        dim = dim or embedding_width(in_dim) // heads * heads
        landmarks = dim // 2 if landmarks is None else landmarks
        self.reduce = nn.Linear(in_dim, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention1, self.attention2 = (
            NystromAttention(dim, heads, landmarks, pinv_iterations, residual_kernel, dropout) for _ in range(2)
        )
        self.position = PPEG(dim)
        self.classifier = nn.Linear(dim, n_classes)

    def pool(
        self, h: Float[Tensor, "n k h"], mask: Bool[Tensor, "n k"] | None = None
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Run the transformer; returns the class token and the mean of the heads' attention.

        Raises
        ------
        ValueError
            If a bag has no instance.
        """
        z, maps = self._transform(h, mask)
        return z, mean_attention_logits(maps)

    def _transform(
        self, h: Float[Tensor, "n k d"], mask: Bool[Tensor, "n k"] | None
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n h k"]]:
        if mask is None or bool(mask.all()):
            return self._transform_whole(h)
        # Square, landmarks and convolutions depend on the number of instances: a bag is only what it is alone if it is
        # transformed alone.
        if not bool(mask.any(1).all()):
            empty = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"mask: every bag needs at least one instance, bag {empty} has none")
        tokens, maps = [], []
        for bag, real in zip(h, mask, strict=True):
            z, found = self._transform_whole(bag[real].unsqueeze(0))
            tokens.append(z)
            hidden = found.new_full((1, found.shape[1], len(real)), -torch.inf)
            maps.append(hidden.masked_scatter(real, found))
        return torch.cat(tokens), torch.cat(maps)

    def _transform_whole(self, h: Float[Tensor, "n k d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n h k"]]:
        size = h.shape[1]
        repeated = math.ceil(math.sqrt(size)) ** 2 - size
        x = torch.cat([self.token.expand(h.shape[0], -1, -1).to(h.dtype), h, h[:, :repeated]], dim=1)
        y, row = self.attention1(self.norm1(x), first_row=True)
        x = self.position(x + y)
        x = x + self.attention2(self.norm2(x))[0]
        row = row[..., 1 : 1 + size] + F.pad(row[..., 1 + size :], (0, size - repeated))
        return self.norm(x[:, 0]), _share_logits(row.float())

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,  # noqa: ARG002
    ) -> MultiHeadOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel].

        Raises
        ------
        ValueError
            If a shape or dtype does not fit, or a bag has no instance.
        """
        check_bags(x, mask, self.in_dim)
        z, maps = self._transform(self.embed(x), mask)
        return MultiHeadOutput(self.head(z), mean_attention_logits(maps), z, maps)


def _attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def _share_logits(weight: Tensor) -> Tensor:
    """Logits whose softmax is the share of every positive weight in their sum; equal shares if none is positive."""
    weight = weight.clamp(min=0)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1.0)
    share = weight / weight.sum(-1, keepdim=True)
    return torch.where(share > 0, share, 1.0).log().masked_fill(share == 0, -torch.inf)
