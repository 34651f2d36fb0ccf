"""Rotary positions as matrix exponentials, R(p) = exp(sum_a p_a B_a): their derivation, and what
else they allow.

Su (https://kexue.fm/archives/8397) asks for R(p)ᵀ R(q) = R(q - p) and for p to be recoverable from
R(p). Rotations are exponentials of skew-symmetric B, and the first condition holds if and only if
the B_a of all axes commute. Then

    2 x 2    every skew-symmetric matrix is a multiple of one: x and y would rotate by a x + b y,
             one number for two;
    3 x 3    each is a cross product with a vector; u and v commute only if u × v = 0: one axis;
    4 x 4    two planes rotate independently, one by x and one by y: the simplest solution, of which
             axial RoPE is many copies.

In D channels at most D // 2 independent matrices commute, so A axes need D >= 2 A. Commuting
matrices share an orthogonal basis of planes, in which each is a list of D / 2 frequencies. What
multiplies both queries and keys can be part of their projections, so every solution is a `Rotary`
with other weights: `diagonalize` finds it, `string` learns the basis.

Shapes   L layers and H heads, A axes, S diagonal blocks of b channels each, S · b = D
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base import Layout, Position
from ..encoding import Encoding
from ..specs import register
from ..transform import Transform
from .axial import axial
from .base import Pairs, Rotary, geometric


def simplest(size: int, axes: int = 2) -> Tensor:
    """Generators (A, size, size) of the simplest solution: axis a rotates channels 2a and 2a + 1,
    at 1 radian per unit.

    Raises ValueError where there is no solution.
    """
    if size < 2 * axes:
        raise ValueError(
            f"skew-symmetric {size} x {size} matrices commute in at most {size // 2} independent directions, "
            f"so from their exponential {axes} coordinates cannot be recovered; use {2 * axes} x {2 * axes} or more"
        )
    plane = torch.arange(axes)
    generators = torch.zeros(axes, size, size, dtype=torch.float64)
    generators[plane, 2 * plane + 1, 2 * plane] = 1.0
    return generators - generators.mT


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (…, size, size) from the entries below their diagonals (…, size ·
    (size - 1) / 2).
    """
    row, column = torch.tril_indices(size, size, -1, device=entries.device)
    lower = entries.new_zeros(*entries.shape[:-1], size, size)
    lower[..., row, column] = entries
    return lower - lower.mT


def cayley(generator: Tensor) -> Tensor:
    """Orthogonal matrices (I - S)(I + S)^-1 of skew-symmetric S (…, D, D)."""
    one = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    return torch.linalg.solve_ex(one + generator, one - generator).result  # the two commute; I + S has an inverse


def diagonalize(generators: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies (A, D / 2) of commuting generators (A, D, D), and the orthogonal basis (D, D)
    that reduces them.

    exp(sum_a p_a B_a) = U R U^T, where R rotates channels 2j and 2j + 1 by sum_a p_a freqs[a, j].
    Computed in float64. Raises ValueError where they are not skew-symmetric or do not commute.
    """
    b = generators.detach().double()
    scale = b.abs().max().clamp(min=1e-30)
    if (b + b.mT).abs().max() > 1e-6 * scale or b.shape[-1] % 2:
        raise ValueError(f"generators must be skew-symmetric matrices of even size, got shape {tuple(b.shape)}")
    commutators = b[:, None] @ b - b @ b[:, None]
    if commutators.abs().max() > 1e-6 * scale**2:
        raise ValueError(
            f"generators do not commute: entries of B_a B_b - B_b B_a reach {commutators.abs().max():.2g}, "
            f"so no basis is common to them and logits depend on more than displacements"
        )
    mixture = torch.randn(
        len(b), generator=torch.Generator().manual_seed(0), dtype=b.dtype
    )  # separates shared eigenspaces
    values, vectors = torch.linalg.eigh(1j * (mixture[:, None, None] * b).sum(dim=0))
    rotating = vectors[:, values > 1e-9 * scale]
    planes = 2**0.5 * torch.stack((rotating.real, rotating.imag), dim=-1).flatten(1)
    still = torch.linalg.qr(torch.cat((planes, torch.eye(len(planes), dtype=b.dtype)), dim=1))[0][:, planes.shape[1] :]
    basis = torch.cat((planes, still), dim=1)
    first, second = basis[:, ::2], basis[:, 1::2]
    return ((b @ first) * second).sum(dim=-2), basis


def exponential(generators: Tensor, coords: Tensor) -> Tensor:
    """R(p) = exp(sum_a p_a B_a) (L, B, N, H, S, b, b) of generators (L, H, A, S, b, b) at (N, A) or
    (B, N, A).
    """
    coords = coords.reshape(1, -1, coords.shape[-2], 1, coords.shape[-1], 1, 1, 1)
    return torch.linalg.matrix_exp((coords * generators.to(coords.device, coords.dtype)[:, None, None]).sum(dim=4))


def block_diagonal(blocks: Tensor) -> Tensor:
    """Matrices (…, S · b, S · b) with blocks (…, S, b, b) on their diagonals."""
    one = torch.eye(blocks.shape[-3], dtype=blocks.dtype, device=blocks.device)
    return (blocks[..., None, :] * one[:, None, :, None]).flatten(-4, -3).flatten(-2)


class Exponential(Position):
    """Queries and keys multiplied by R(p) = exp(sum_a p_a B_a) as written, with matrices for each
    token and head.

    For study: where the generators commute, `Rotary` in another basis is the same for the cost of a
    table. Here a token takes b numbers per channel in blocks of b channels, for each layer and head
    with its own generators, and a matrix exponential: in blocks of 8, with 64 channels, 12 layers
    and 6 heads, 28 MB for 14 x 14 tokens and 144 MB for 32 x 32. Subclasses give generators (L, H,
    A, S, b, b) on the device and in the precision of the coordinates, with L and H 1 where layers
    and heads share, or R(p) itself. Blocks that extend beyond the head are cut off.
    """

    reversible = True
    unbounded = True

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.size = layout.head_dim

    def generators(self, coords: Tensor) -> Tensor:
        """The generators (L, H, A, S, b, b)."""
        raise NotImplementedError(f"{type(self).__name__} needs generators()")

    def rotations(self, coords: Tensor) -> Tensor:
        """The blocks (L, B, N, H, S, b, b) of R(p) at coordinates (N, A) or (B, N, A)."""
        return exponential(self.generators(coords), coords)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self._matrices(key_coords)
        return Encoding(self._matrices(coords), k)

    def _matrices(self, coords: Tensor) -> Transform:
        blocks = self.rotations(coords)
        if blocks.shape[-3] * blocks.shape[-1] > self.size:
            blocks = block_diagonal(blocks)[..., : self.size, : self.size]
        return Transform(basis=list(blocks.mT.unbind(0)))  # transposed, because channels are rows


@register
class Commuting(Exponential):
    """Learned generators that commute because they are odd powers of one: B_a = sum_k c_ak S^(2k +
    1), S^T = -S.

    In blocks of b channels, the odd powers of one skew-symmetric S with distinct frequencies span
    everything that commutes with it, so this is every relative rotary scheme of such blocks
    (arXiv:2504.06308), for each layer and head. S is initialised at random with norm 1;
    coefficients from a normal distribution, times base^(-s/S) in block s, in radians per unit.
    Raises ValueError for a block that is odd or does not divide the head dimension.
    """

    def __init__(self, layout: Layout, block: int = 4, base: float = 10.0) -> None:
        super().__init__(layout)
        count = blocks_of("commuting", layout, block)
        if block % 2 or layout.head_dim < 2 * layout.axes:
            raise ValueError(
                f"commuting needs an even block and a head_dim of at least {2 * layout.axes} for {layout.axes} axes, "
                f"got block {block} and head_dim {layout.head_dim}"
            )
        if base <= 0:
            raise ValueError(f"commuting needs a positive base, got {base}")
        self.block, self.base = block, base
        of_each = (layout.depth, layout.heads)
        self.entries = nn.Parameter(torch.empty(*of_each, count, block * (block - 1) // 2))
        self.powers = nn.Parameter(torch.empty(*of_each, layout.axes, count, block // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.entries)
        nn.init.normal_(self.powers)
        with torch.no_grad():
            self.entries.div_(self.entries.norm(dim=-1, keepdim=True))
            self.powers.mul_(geometric(self.powers.shape[-2], self.base)[:, None].to(self.powers))

    def generators(self, coords: Tensor) -> Tensor:
        odd = [skew(self.entries.to(coords.dtype), self.block)]
        for _ in range(1, self.block // 2):
            odd.append(odd[-1] @ odd[0] @ odd[0])
        return (self.powers[..., None, None] * torch.stack(odd, dim=-3)[:, :, None]).sum(dim=-3)

    def folded(self) -> tuple[Tensor, Rotary]:
        """The basis (L, H, D, D) of the generators' planes, and the same scheme in that basis: a
        `mixed` one.
        """
        generators = block_diagonal(self.generators(torch.zeros(1, dtype=torch.float64)).detach().double())
        reduced = [[diagonalize(head) for head in layer] for layer in generators]
        freqs, basis = (torch.stack([torch.stack([head[i] for head in layer]) for layer in reduced]) for i in (0, 1))
        return basis, Rotary(freqs, learned=True)


@register
class LieRE(Exponential):
    """One learned generator per axis, which do not commute: a control that is not relative
    (arXiv:2406.10322).

    In blocks of b channels, for each layer and head. Entries are initialised uniformly in [0, 2 pi)
    radians per length of the longest side of the training grid. Relative on one axis, and for
    block=2, where matrices commute. Raises ValueError for a block that does not divide the head
    dimension.
    """

    def __init__(self, layout: Layout, block: int = 8) -> None:
        super().__init__(layout)
        count = blocks_of("liere", layout, block)
        self.block, self.relative = block, layout.axes == 1 or block == 2
        coords = layout.coords(device=torch.device("cpu"))
        self.side = max(1.0, float((coords.amax(dim=0) - coords.amin(dim=0)).max()))
        shape = (layout.depth, layout.heads, layout.axes, count, block * (block - 1) // 2)
        self.entries = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.entries, 0.0, 2 * torch.pi / self.side)

    def generators(self, coords: Tensor) -> Tensor:
        return skew(self.entries, self.block)


@register
class String(Rotary):
    """Axial RoPE in a basis that each head learns: U = (I - S)(I + S)^-1 of a skew-symmetric S,
    arXiv:2502.02562.

    Queries and keys are multiplied by U (D, D), then rotated (Cayley-STRING). S is initialised from
    a normal distribution with standard deviation `std`. A learned basis can become part of the
    projections: `vit_rope.convert.fold` does that. Raises ValueError as `axial` does.
    """

    def __init__(self, layout: Layout, base: float = 100.0, std: float = 0.02, pairs: Pairs = "interleaved") -> None:
        super().__init__(axial(layout, base, "rest", pairs).initial, pairs)
        if std < 0:
            raise ValueError(f"string needs a standard deviation of 0 or more, got {std}")
        self.size, self.std = layout.head_dim, std
        self.entries = nn.Parameter(torch.empty(layout.depth, layout.heads, self.size * (self.size - 1) // 2))
        nn.init.normal_(self.entries, std=std)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.entries, std=self.std)

    def basis(self) -> Tensor:
        """The orthogonal matrices U (L, H, D, D)."""
        return cayley(skew(self.entries, self.size))

    def folded(self) -> tuple[Tensor, Rotary]:
        """The basis (L, H, D, D), and the same scheme in that basis: an `axial` one."""
        folded = Rotary(self.initial, self.pairs)
        folded.changes = list(self.changes)
        return cayley(skew(self.entries.detach().double(), self.size)), folded

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        basis = list(self.basis().unbind(0))
        k = encoding.k and encoding.k._replace(basis=basis)
        return encoding._replace(q=encoding.q._replace(basis=basis), k=k)


def blocks_of(name: str, layout: Layout, block: int) -> int:
    """How many blocks of channels a head has."""
    head = layout.head_dim
    if block < 2 or head % block:
        raise ValueError(f"{name} needs blocks of 2 channels or more that divide head_dim {head}, got {block}")
    return head // block
