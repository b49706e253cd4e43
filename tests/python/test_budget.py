"""The reference of `budget` against values worked by hand, and calibc's masks against the reference."""

from __future__ import annotations

import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import budget
import numpy as np
import recipe

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"


class ByHand(unittest.TestCase):
    def test_prompts_together(self) -> None:
        values = [np.array([1.0, 4.0]), np.array([3.0, 0.0])]
        self.assertEqual(budget.together(values, "mean").tolist(), [2.0, 2.0])
        self.assertEqual(budget.together(values, "max").tolist(), [3.0, 4.0])

    def test_what_blocks_of_a_row_are_worth(self) -> None:
        energy = np.array([[0.5, 0.25, 0.125, 0.125]] * 2)
        importance = np.array([[0.4, 0.1, 0.02, 0.01]] * 2)
        forced = np.array([[True, False, False, False], [True, True, True, True]])
        worth = budget.worth(energy, importance, forced)
        # Nothing but the strongest block stays: half of the energy. Losses are convex: each block has its own.
        losses = [0.0, *(d * (0.53 - d) / 0.53 / m**2 for d, m in ((0.01, 0.875), (0.03, 0.75), (0.13, 0.5)))]
        np.testing.assert_allclose(worth[0], [0, *np.diff(losses)[::-1]], rtol=1e-12)
        self.assertFalse(worth[1].any())
        # Where they are not, neighbours share: a block of much energy and no deviation makes the next one cheaper.
        energy, importance = np.array([[0.25, 0.25, 0.5]]), np.array([[0.5, 0.1, 0.099]])
        worth = budget.worth(energy, importance, np.array([[True, False, False]]))
        self.assertTrue(worth[0, 1] >= worth[0, 2] and worth[0, 0] == 0)
        self.assertAlmostEqual(float(worth.sum()), 0.199 * 0.5 / 0.699 / 0.25**2)

    def test_the_form_of_a_site_at_a_price(self) -> None:
        # Two blocks stay anyway; of the others, at a price of 0.3 the two of 0.5 stay and the four of 0.125 go.
        scores = np.array([[9, 0.5, 0.125, 0.125], [0.125, 0.125, 0.5, 9]], np.float32)
        forced = scores > 1
        place = int(np.searchsorted(budget.PRICES, 0.3))
        kept, better = budget.forms(scores, forced, 1.0, None, 1.0)
        self.assertEqual([kept[0], kept[place], kept[budget.GRID]], [8, 4, 2])
        self.assertFalse(better.any())
        # As a mask it costs 4 * 0.125 + 0.3 * 4 = 1.7; at anchor rows 2 * error + 0.3.
        for error, wins in [(0.69, True), (0.71, False)]:
            _, better = budget.forms(scores, forced, 1.0, error, 1.0)
            self.assertEqual(bool(better[place]), wins)

    def test_queries_at_anchor_rows(self) -> None:
        trace = recipe.Trace(TRACES)
        self.assertEqual(budget.computed_queries(trace, 5), 16 * 5 * 32)
        trace.frames, trace.height, trace.width, trace.video, trace.text = 1, 4, 64, 256, 10
        # A text block of its own: its 10 tokens, and one anchor row of two.
        self.assertEqual(budget.computed_queries(trace, 2), 2 * 64 + 10)

    def test_a_plan_of_its_density(self) -> None:
        trace = recipe.Trace(TRACES)
        tensors = budget.select(trace, budget.Policy(0.3, anchors=0))
        kept = sum(int(masks.sum()) for name, masks in tensors.items() if not name.endswith(".op"))
        self.assertEqual(kept, int(0.3 * 20 * 6 * 3 * 128 * 128))


@unittest.skipUnless("CALIBC_BIN" in os.environ, "CALIBC_BIN does not name a calibc to compare with")
class AgainstCalibc(unittest.TestCase):
    def test_masks_are_equal_bit_for_bit(self) -> None:
        calibc = os.environ["CALIBC_BIN"]
        other = {"step_floor": 0.25, "row_recall": 0.3, "anchors": 0, "head_weights": "sensitivity"}
        for density, more in [(0.45, {}), (0.3, other)]:
            with self.subTest(density=density), tempfile.TemporaryDirectory() as folder:
                spec, bundle, masks, wanted = (os.path.join(folder, name) for name in ("spec", "bundle", "masks", "wanted"))
                fields = {"density": density, **more}
                words = ", ".join(f"{name}: {'off' if name == 'anchors' else value}" for name, value in fields.items())
                Path(spec).write_text(f"policy: {{kind: budget, {words}}}\n", "utf-8")
                subprocess.run([calibc, "compile", TRACES, "-o", bundle, "--spec", spec, "-q"], check=True)
                subprocess.run([calibc, "export", bundle, "--masks", masks, "-q"], check=True)
                options = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", str(value))]
                self.assertEqual(budget.main([str(TRACES), "-o", wanted, *options]), 0)
                self.assertEqual(recipe.main(["--compare", masks, wanted]), 0)


if __name__ == "__main__":
    unittest.main()
