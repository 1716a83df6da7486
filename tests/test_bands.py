"""Which mode lies in which band, held against fractions.Fraction; counts of the paper and of its released code."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freqkd_analysis.bands import CORNER, FINE, Bands, fine_rings, frequency, mode_numbers, rings
from freqkd_analysis.errors import BandsError

GRIDS = [(1, 1), (1, 9), (7, 1), (2, 2), (5, 8), (8, 5), (13, 13), (14, 14), (16, 12), (37, 46), (31, 17)]
SPECS = [
    "octave:1",
    "octave:3",
    "octave:6",
    "linear:4",
    "linear:7",
    "equal-modes:1",
    "0.1,0.25",
    "1/8,1/3",
    "split:0.5",
]
COVERING = [*SPECS, "released:0.5", "released:0.1"]

grids = st.tuples(st.integers(1, 40), st.integers(1, 40))
specs = st.one_of(
    st.integers(1, 12).map("octave:{}".format),
    st.integers(1, 16).map("linear:{}".format),
    st.integers(1, 99).map(lambda n: f"split:{n / 100}"),
    st.lists(st.integers(1, 70), min_size=1, max_size=5, unique=True).map(
        lambda ks: ",".join(f"{k}/100" for k in sorted(ks))
    ),
)


def signed(k: int, n: int) -> int:
    """Row k of an FFT of length n as a signed mode number."""
    return k if 2 * k < n else k - n


def exact_index(grid: tuple[int, int], edges: list[Fraction]) -> np.ndarray:
    """Band of every mode by rational arithmetic, one mode at a time."""
    out = np.zeros(grid, int)
    for i in range(grid[0]):
        for j in range(grid[1]):
            f2 = Fraction(signed(i, grid[0]), grid[0]) ** 2 + Fraction(signed(j, grid[1]), grid[1]) ** 2
            out[i, j] = sum(f2 >= edge * edge for edge in edges)
    return out


def mirrored(index: np.ndarray) -> np.ndarray:
    """The value at -k for every k."""
    rows, columns = ((-np.arange(n)) % n for n in index.shape)
    return index[rows][:, columns]


# Membership -----------------------------------------------------------------------------------------------------


@given(grids, specs)
def test_every_mode_is_in_exactly_one_band_with_its_mirror(grid, text):
    bands = Bands.parse(text, grid=grid)
    assert bands.modes.sum() == grid[0] * grid[1] and bands.covers and bands.mirrored
    assert np.array_equal(bands.index, mirrored(bands.index))
    assert np.array_equal(bands.index, bands.index[:, (-np.arange(grid[1])) % grid[1]])  # (u, v) with (u, -v)
    assert np.array_equal(bands.weights, bands.index == np.arange(len(bands))[:, None, None])
    assert bands.index[0, 0] == 0
    assert len(bands) == len(bands.names) == len(set(bands.names)) == len(bands.f_lo) == len(bands.f_hi)
    assert bands.f_lo[0] == 0 and bands.f_hi[-1] == CORNER and np.array_equal(bands.f_lo[1:], bands.f_hi[:-1])


@given(grids, st.lists(st.fractions(Fraction(1, 50), Fraction(7, 10), max_denominator=64), min_size=1, max_size=4))
def test_membership_is_rational_arithmetic(grid, edges):
    edges = sorted(set(edges))
    text = ",".join(map(str, edges))
    if text[0] not in "0123456789":
        return
    np.testing.assert_array_equal(Bands.parse(text, grid=grid).index, exact_index(grid, edges))


TIES = [((14, 14), 7), ((24, 24), 12), ((18, 18), 9), ((32, 40), 10)]


@pytest.mark.parametrize("grid, count", TIES)
def test_modes_on_an_edge_go_up_where_floats_waver(grid, count):
    """rho = k/count exactly on these grids; every float form of the comparison puts some such mode one band off."""
    bands = Bands.parse(f"linear:{count}", grid=grid)
    edges = [Fraction(k, 2 * count) for k in range(1, count)]
    np.testing.assert_array_equal(bands.index, exact_index(grid, edges))
    u, v = mode_numbers(grid)
    ties = sum(
        Fraction(int(a), grid[0]) ** 2 + Fraction(int(b), grid[1]) ** 2 in {e * e for e in edges}
        for a in u.ravel() for b in v.ravel()
    )  # fmt: skip
    assert ties >= 4
    wrong = {}
    for dtype in (np.float32, np.float64):
        fu, fv = (np.fft.fftfreq(n).astype(dtype) for n in grid)
        rho = dtype(2) * np.sqrt(fu[:, None] ** 2 + fv**2)
        cuts = np.arange(count + 1).astype(dtype) * dtype(1 / count)
        floats = [np.minimum(np.floor(rho * dtype(count)), count - 1),
                  np.minimum(np.searchsorted(cuts, rho, side="right") - 1, count - 1)]  # fmt: skip
        wrong |= {(dtype, form): int((index != bands.index).sum()) for form, index in enumerate(floats)}
    assert max(wrong.values()) >= 2, wrong


def test_an_edge_includes_the_mode_that_lies_on_it():
    """8 tokens: mode 1 is 1/8 exactly, so it belongs to [1/8, ..)."""
    assert Bands.parse("octave:3", grid=(1, 8)).index[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 1]
    assert Bands.parse("0.125001", grid=(1, 8)).index[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


def test_frequency_is_the_euclidean_norm_in_cycles_per_token():
    f = frequency((4, 6))
    assert f[0, 0] == 0 and f[2, 0] == 0.5 and f[0, 3] == 0.5 and f[2, 3] == pytest.approx(CORNER)
    assert f[1, 0] == 0.25 and f[0, 5] == pytest.approx(1 / 6)
    assert frequency((1, 9))[0].argmax() in (4, 5)


# Kinds of bands -------------------------------------------------------------------------------------------------


def test_octave_edges_halve_downwards():
    bands = Bands.parse("octave:4", grid=(32, 32))
    np.testing.assert_array_equal(bands.f_hi[:-1], [1 / 16, 1 / 8, 1 / 4])
    assert bands.names == ("low", "b1", "b2", "high")
    assert Bands.parse("octave:2", grid=(8, 8)).names == ("low", "high")
    assert Bands.parse("octave:3", grid=(8, 8)).names == ("low", "mid", "high")
    assert Bands.parse("octave:1", grid=(5, 5)).modes.tolist() == [25]


def test_linear_edges_divide_nyquist_and_corners_are_in_the_last():
    bands = Bands.parse("linear:5", grid=(20, 20))
    np.testing.assert_allclose(bands.f_hi[:-1], [0.1, 0.2, 0.3, 0.4])
    assert bands.index[10, 10] == 4


@pytest.mark.parametrize("grid", [(14, 14), (37, 46), (9, 16), (1, 31), (5, 8)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_modes_are_as_equal_as_whole_rings_allow(grid, count):
    bands = Bands.parse(f"equal-modes:{count}", grid=grid)
    u, v = mode_numbers(grid)
    sizes = np.unique(u**2 * grid[1] ** 2 + v**2 * grid[0] ** 2, return_counts=True)[1]
    whole, reached = np.cumsum(sizes), np.cumsum(bands.modes)
    assert reached[-1] == grid[0] * grid[1] and (bands.modes > 0).all()
    for k in range(1, count):  # no other cut between rings comes nearer to k/count of all modes
        assert abs(reached[k - 1] - k * whole[-1] / count) == np.abs(whole[:-1] - k * whole[-1] / count).min()


def test_equal_modes_of_as_many_bands_as_rings_takes_one_each():
    assert Bands.parse("equal-modes:3", grid=(2, 2)).modes.tolist() == [1, 2, 1]


def test_split_is_a_ring_at_a_share_of_nyquist():
    bands = Bands.parse("split:0.5", grid=(37, 46))
    np.testing.assert_array_equal(bands.index, exact_index((37, 46), [Fraction(1, 4)]))
    assert bands.f_hi[0] == 0.25


def test_edges_per_pixel_are_edges_per_token_over_stride():
    per_pixel = Bands.parse("0.01,0.02/px", grid=(16, 16), stride=14)
    per_token = Bands.parse("0.14,0.28", grid=(16, 16))
    np.testing.assert_array_equal(per_pixel.index, per_token.index)
    np.testing.assert_allclose(per_pixel.f_hi[:-1], [0.14, 0.28])
    assert Bands.parse("1/112/px", grid=(1, 8), stride=14).index[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]  # 1/8 exact


@pytest.mark.parametrize("stride, modes", [(4, [69, 180, 756, 11539]), (32, [69, 122, 5, 0]), (64, [49, 0, 0, 0])])
def test_edges_per_pixel_name_the_same_frequencies_at_every_stride(stride, modes):
    """Above a coarse layer's corner a band stays, without a mode: `high` is never another layer's `mid`."""
    bands = Bands.parse("0.01,0.02,0.04/px", grid=(448 // stride, 448 // stride), stride=stride)
    assert bands.names == ("low", "b1", "b2", "high") and bands.modes.tolist() == modes
    assert (bands.f_lo <= bands.f_hi).all() and bands.f_hi.max() == CORNER
    atoms = bands.atoms()
    np.testing.assert_array_equal(atoms.modes @ atoms.to_bands, modes)
    assert (np.diff(atoms.f_lo) >= 0).all() and (atoms.f_lo <= atoms.f_hi).all()
    pixels = fine_rings(bands, (448, 448), stride)
    known = atoms.to_bands[pixels[pixels >= 0]].sum(0)
    assert pixels.max() < len(atoms) and (known[np.array(modes) == 0] == 0).all()
    assert ((pixels >= 0) == (stride * frequency((448, 448)) < CORNER - 1e-12)).all()


EMPTY = [
    ("octave:6", (4, 4), [1, 0, 0, 0, 0, 15]),
    ("0.01,0.02", (8, 8), [1, 0, 63]),
    ("linear:4", (1, 2), [1, 0, 0, 1]),
]


@pytest.mark.parametrize("text, grid, modes", EMPTY)
def test_a_band_that_a_grid_cannot_resolve_stays_with_no_mode(text, grid, modes):
    bands = Bands.parse(text, grid=grid)
    assert bands.modes.tolist() == modes
    assert not bands.weights[bands.modes == 0].any() and bands.weights.shape == (len(modes), *grid)
    np.testing.assert_array_equal(bands.atoms().modes @ bands.atoms().to_bands, modes)


def test_paper_bands_have_the_papers_counts():
    bands = Bands.parse("paper", grid=(37, 46))
    assert bands.modes.tolist() == [69, 1125] and (bands.index == -1).sum() == 508
    assert not bands.covers and bands.mirrored and bands.edges2 is None


@pytest.mark.parametrize("grid", [(37, 46), (46, 37), (16, 16), (9, 12)])
def test_paper_bands_are_its_script_on_the_shifted_spectrum(grid):
    """r = distance in index units from the centre over min(H//2, W//2); low r <= .25, high r >= .75."""
    height, width = grid
    y, x = np.mgrid[:height, :width]
    r = np.hypot(y - height // 2, x - width // 2) / min(height // 2, width // 2)
    index = np.where(r <= 0.25, 0, np.where(r >= 0.75, 1, -1))
    np.testing.assert_array_equal(np.fft.fftshift(Bands.parse("paper", grid=grid).index), index)


RELEASED = [("0.10", 8, 5, 0.31), ("0.25", 80, 17, 0.106), ("0.50", 396, 39, 0.049), ("0.75", 884, 59, 0.033)]


@pytest.mark.parametrize("cut, inside, alone, lost", RELEASED)
def test_released_rectangle_has_the_releases_counts(cut, inside, alone, lost):
    """FACTS 3.1 on 37 x 46: modes, modes without their mirror, low-band energy of white input lost by the real part."""
    bands = Bands.parse(f"released:{cut}", grid=(37, 46))
    low = bands.index == 0
    assert bands.modes.tolist() == [inside, 37 * 46 - inside]
    assert (low & ~mirrored(low)).sum() == alone
    assert not bands.mirrored and bands.covers
    assert 1 - (bands.weights[0] ** 2).sum() / inside == pytest.approx(lost, rel=0.02)
    np.testing.assert_array_equal(bands.weights.sum(0), 1)


@pytest.mark.parametrize("grid", [(37, 46), (16, 16), (9, 12), (3, 2)])
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.75])
def test_released_rectangle_is_a_slice_of_the_shifted_spectrum(grid, cut):
    mask = np.zeros(grid, bool)
    slices = [slice(n // 2 - max(1, int(n * cut / 2)), n // 2 + max(1, int(n * cut / 2))) for n in grid]
    mask[tuple(slices)] = True
    low = np.fft.ifftshift(mask)
    bands = Bands.parse(f"released:{cut}", grid=grid)
    np.testing.assert_array_equal(bands.index == 0, low)
    np.testing.assert_array_equal(bands.weights[0], (low.astype(float) + mirrored(low)) / 2)


# Atoms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [*COVERING, "paper"])
def test_atoms_refine_the_bands_and_add_up_to_them(grid, text):
    bands = Bands.parse(text, grid=grid)
    atoms = bands.atoms()
    assert atoms.index.shape == grid and atoms.index.min() >= 0 and atoms.index.max() < len(atoms)
    np.testing.assert_array_equal(np.bincount(atoms.index.ravel(), minlength=len(atoms)), atoms.modes)
    assert atoms.to_bands.shape == (len(atoms), len(bands)) and len(atoms.f_lo) == len(atoms.f_hi) == len(atoms)
    np.testing.assert_allclose(atoms.to_bands[atoms.index], np.moveaxis(bands.weights, 0, -1) ** 2)  # one band an atom
    np.testing.assert_allclose(atoms.modes @ atoms.to_bands, (bands.weights**2).sum((1, 2)))
    if bands.edges2 is not None:
        np.testing.assert_array_equal(atoms.modes @ atoms.to_bands, bands.modes)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [*COVERING, "paper"])
def test_dc_is_an_atom_of_its_own(grid, text):
    atoms = Bands.parse(text, grid=grid).atoms()
    assert (atoms.index == atoms.index[0, 0]).sum() == 1 and atoms.index[0, 0] == 0
    assert atoms.f_lo[0] == atoms.f_hi[0] == 0


@pytest.mark.parametrize("text", ["octave:3", "0.1,0.25", "linear:7"])
def test_every_mode_lies_within_its_atoms_radii(text):
    bands = Bands.parse(text, grid=(23, 30))
    atoms, f = bands.atoms(), frequency((23, 30))
    lo, hi = atoms.f_lo[atoms.index], atoms.f_hi[atoms.index]
    assert (f >= lo - 1e-12).all() and (f <= hi + 1e-12).all()
    assert (atoms.f_hi - atoms.f_lo).max() <= 1 / FINE + 1e-12


def test_ring_atoms_are_the_same_rings_on_every_grid():
    """Tables of layers with unlike grids share their radius numbers."""
    small, large = (Bands.parse("octave:3", grid=grid).atoms() for grid in [(7, 7), (64, 80)])
    np.testing.assert_array_equal(small.f_lo, large.f_lo)
    np.testing.assert_array_equal(small.to_bands, large.to_bands)
    assert (small.modes == 0).any() and len(small) == len(large)


def test_fine_rings_of_pixels_hold_the_same_physical_frequencies():
    """A 2-cycle wave over 64 px is 2/64 cycles per px, 1/4 cycle per 8-px token: the band edge of octave:3."""
    bands = Bands.parse("octave:3", grid=(8, 8), stride=8)
    ring = fine_rings(bands, (64, 64), 8)
    tokens = bands.atoms().index
    for u, v in [(0, 0), (1, 0), (2, 0), (2, 1), (3, 3)]:
        assert ring[u, v] == tokens[u, v]
    assert ring[0, 32] == ring[6, 0] == -1  # above the corner of the tokens
    assert ((fine_rings(bands, (64, 64), 8) >= 0) == (rings((64, 64), (Fraction(1, 2) / 64,)) == 0)).mean() > 0.99


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("0.3,0.2", 'expected increasing band edges, got "0.3,0.2"'),
        ("0.2,0.2", "expected increasing band edges"),
        ("0.1,x", 'expected a number as band edge or cut-off, got "x"'),
        ("1/0", 'got "1/0"'),
        ("0.9", 'expected an edge between 0 and 0.7071 cycles per token, got "0.9"'),
        ("octav:3", 'got "octav:3". Did you mean "octave"?'),
        ("equal_modes:3", 'Did you mean "equal-modes"?'),
        (
            "",
            "expected bands octave, linear, equal-modes, split, paper, released, random or edges such as 0.1,0.25; got",
        ),
        ("octave:0", 'expected octave:K with 1 <= K <= 64, got "octave:0"'),
        ("octave:65", 'got "octave:65"'),
        ("linear:", 'got "linear:"'),
        ("linear:2.5", 'got "linear:2.5"'),
        ("equal-modes:-1", "1 <= K <= 64"),
        ("equal-modes:30", "expected at most 15 bands on a 8x8 grid, got equal-modes:30"),
        ("split:1", "expected split:C with 0 < C < 1 (a share of Nyquist), got split:1"),
        ("split:0", "0 < C < 1"),
        ("released:x", 'got "x"'),
        ("released:1.5", "got released:1.5"),
        ("paper:3", 'the bands "paper" take no argument, got "paper:3"'),
        ("0.01,0.02/px", 'edges in cycles per pixel ("0.01,0.02/px") need the stride of the layer, got none'),
    ],
)
def test_what_cannot_be_read_is_said_with_its_numbers(text, says):
    with pytest.raises(BandsError) as error:
        Bands.parse(text, grid=(8, 8))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("grid", [(0, 4), (4, 5000)])
def test_impossible_grids_are_refused_by_their_numbers(grid):
    with pytest.raises(ValueError, match=f"expected a grid of 1 to 4096 tokens a side, got {grid[0]}x{grid[1]}"):
        Bands.parse("octave:3", grid=grid)


def test_spaces_around_the_text_do_not_matter():
    assert Bands.parse(" octave:3 ", grid=(8, 8)).text == "octave:3"
