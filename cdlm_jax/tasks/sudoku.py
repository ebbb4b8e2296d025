"""4x4 Sudoku: `0042203140233214:` (row by row, 0 is empty) -> the 16 digits of the full grid.

288 grids exist. Those that occur in Dream's public 4x4 test files are held out as whole grids; the other 63 are for
training. So few invite memorizing, so half of the training problems carry other digits than 1-4 (`renamed`).
Up to renaming there are only 12 grids: held out means that a grid was never seen, not that its pattern was never seen.
"""

import random
from functools import cache
from itertools import permutations

import numpy as np

from cdlm_jax.tasks.base import Problem, Task

FEWEST_EMPTY, MOST_EMPTY = 4, 12
PLAIN = frozenset("1234")
# Bit i (bit 0 is the lowest) is set if grid i of `grids()` occurs in dream_sudoku_4x4_{4,8,12}.jsonl.
_IN_TEST_FILES = 0xCFFFBFEF6729EF97FDFBFFE7F7FDBBBD6BFDFFFFAFFAFDF5EE797EC9EDAE7F2EEEBDFF7F
_ROWS = [[4 * r + c for c in range(4)] for r in range(4)]
_COLUMNS = [[4 * r + c for r in range(4)] for c in range(4)]
_BOXES = [[4 * r + c for r in (top, top + 1) for c in (left, left + 1)] for top in (0, 2) for left in (0, 2)]
_UNITS = _ROWS + _COLUMNS + _BOXES


def is_complete(grid: str) -> bool:
    """True if every row, column and box of the 16 characters holds four different symbols."""
    return all(len({grid[cell] for cell in unit}) == 4 for unit in _UNITS)


@cache
def grids() -> tuple[str, ...]:
    """All 288 complete grids of the symbols 1-4, in rising order."""
    rows = ["".join(row) for row in permutations("1234")]
    found = []
    for first in rows:
        for second in rows:
            if set(first[:2]) & set(second[:2]):
                continue
            for third in rows:
                for fourth in rows:
                    grid = first + second + third + fourth
                    if is_complete(grid):
                        found.append(grid)
    return tuple(found)


@cache
def grids_of(split: str) -> tuple[str, ...]:
    """The grids of one split: 225 held-out ones, 63 for training."""
    return tuple(grid for i, grid in enumerate(grids()) if (_IN_TEST_FILES >> i & 1) == (split == "heldout"))


@cache
def _unique_givens(pattern: str, all_symbols: bool) -> dict[int, np.ndarray]:
    """The cell sets (16-bit masks) that, if given, leave `pattern` as the only solution, by number of empty cells.

    all_symbols: only sets in which each of the four symbols is given.
    """
    cells = 1 << np.arange(16)
    agrees = np.array([[a == b for a, b in zip(pattern, other, strict=True)] for other in grids() if other != pattern])
    ambiguous = np.zeros(1 << 16, bool)  # [cell set]: some other grid agrees with the pattern on all of these cells
    ambiguous[agrees @ cells] = True
    for cell in range(16):  # subsets of an ambiguous set are ambiguous
        halves = ambiguous.reshape(-1, 2, 1 << cell)
        halves[:, 0] |= halves[:, 1]
    masks = np.flatnonzero(~ambiguous)
    if all_symbols:
        for symbol in PLAIN:
            masks = masks[masks & sum(1 << i for i in range(16) if pattern[i] == symbol) != 0]
    empties = 16 - np.bitwise_count(masks)
    return {n: masks[empties == n] for n in range(FEWEST_EMPTY, MOST_EMPTY + 1) if (empties == n).any()}


def _puzzle(rng: random.Random, grid: str, all_symbols: bool) -> str:
    """Empties 4 to 12 cells of a grid of 1-4; the solution stays unique."""
    # Renaming symbols does not change which cells decide a grid: 12 patterns stand for all.
    pattern = grid.translate(str.maketrans(grid[:4], "1234"))
    choices = _unique_givens(pattern, all_symbols)
    mask = int(rng.choice(choices[rng.choice(tuple(choices))]))
    return "".join(symbol if mask >> i & 1 else "0" for i, symbol in enumerate(grid))


class Sudoku4(Task):
    """Fill the grid so that each row, column and 2x2 box holds the four symbols once. 4 to 12 cells are empty."""

    name = "sudoku4"
    characters = "0123456789:"

    def sample(self, rng: random.Random, split: str) -> Problem:
        grid = rng.choice(grids_of(split))
        renamed = split == "train" and rng.random() < 0.5
        # The reader of a renamed puzzle must be able to tell its four symbols, so each is given at least once.
        puzzle = _puzzle(rng, grid, all_symbols=renamed)
        if renamed:
            symbols = rng.sample("123456789", 4)
            while set(symbols) == PLAIN:
                symbols = rng.sample("123456789", 4)
            names = str.maketrans("1234", "".join(symbols))
            puzzle, grid = puzzle.translate(names), grid.translate(names)
        return Problem(puzzle + ":", grid)

    def from_prompt(self, prompt: str) -> Problem:
        if len(prompt) != 17 or prompt[-1] != ":" or not set(prompt[:-1]) <= set("0123456789"):
            raise self.malformed(prompt, "16 digits row by row (0: empty), then ':', as 0042203140233214:")
        symbols = _symbols(prompt)
        if len(symbols) != 4:
            raise self.malformed(prompt, "a puzzle of the symbols 1-4, or of four other digits that all occur in it")
        names = str.maketrans("1234", "".join(sorted(symbols)))
        for grid in grids():
            answer = grid.translate(names)
            if _keeps_givens(prompt, answer):
                return Problem(prompt, answer)
        raise self.malformed(prompt, "solvable: no complete grid has these givens")

    def key(self, problem: Problem) -> str:
        return problem.answer

    def is_heldout(self, key: str) -> bool:
        return key in grids_of("heldout")

    def score(self, problem: Problem, response: str) -> bool:
        """Any complete grid of the puzzle's symbols that keeps the givens."""
        return (
            len(response) == 16
            and set(response) == _symbols(problem.prompt)
            and is_complete(response)
            and _keeps_givens(problem.prompt, response)
        )


def _symbols(prompt: str) -> frozenset[str]:
    given = frozenset(prompt[:-1]) - {"0"}
    return PLAIN if given <= PLAIN else given


def _keeps_givens(prompt: str, grid: str) -> bool:
    return all(given in ("0", symbol) for given, symbol in zip(prompt[:-1], grid, strict=True))
