"""The reference recipe against values worked by hand, and calibc's masks against the reference."""

import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy as np

import recipe

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"


class ByHand(unittest.TestCase):
    def test_the_fewest_blocks_that_reach_epsilon(self):
        energy = np.array([[0.25, 0.5, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0]])
        kept = lambda eps: [np.flatnonzero(row).tolist() for row in recipe.top_p(energy, eps)]
        self.assertEqual(kept(0.4), [[1], [2]])
        # Exactly reached is reached, and of equals the lower index comes first.
        self.assertEqual(kept(0.5), [[1], [2]])
        self.assertEqual(kept(0.6), [[0, 1], [2]])
        self.assertEqual(kept(0.8), [[0, 1, 3], [2]])
        self.assertEqual(kept(0.0), [[], []])

    def test_votes_text_and_empty_rows(self):
        one_hot = lambda *columns: np.eye(4)[list(columns)]
        energies = [one_hot(0, 1, 3), one_hot(0, 2, 2), one_hot(1, 3, 0)]
        mask = recipe.site_mask(energies, 0.5, 0.5, [])
        # Row 0: two of three. Rows 1 and 2: nobody agrees, all are equally strong, so the lowest stays.
        self.assertEqual(mask.astype(int).tolist(), [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
        mask = recipe.site_mask(energies, 0.5, 0.5, [2])
        self.assertEqual(mask.astype(int).tolist(), [[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])

    def test_epsilon_falls_from_c_to_a(self):
        self.assertEqual(recipe.epsilon(0, 50, 0.8, 0.99, 16.0), 0.99)
        self.assertAlmostEqual(recipe.epsilon(25, 50, 0.8, 0.99, 16.0), 0.8 + 0.19 * 0.00033546262790251185)

    def test_uncovered_steps_take_the_nearest_and_of_two_the_earlier(self):
        trace = recipe.Trace(TRACES)
        self.assertEqual(trace.covered, [3, 13])
        self.assertEqual([trace.nearest_covered(step) for step in (0, 7, 8, 9, 19)], [3, 3, 3, 13, 13])

    def test_held_out_prompts_do_not_vote(self):
        self.assertEqual(recipe.Trace(TRACES).prompts, ["p000", "p001"])

    def test_codes_decode_to_powers(self):
        self.assertEqual(recipe.TABLE[[0, 8, 80, 255]].tolist(), [1.0, 0.5, 2.0**-10, 0.0])

    def test_a_file_survives_and_differences_are_listed(self):
        with tempfile.TemporaryDirectory() as folder:
            a, b = (os.path.join(folder, name) for name in "ab")
            masks = {"s10.l0": np.ones((2, 3, 3)), "s9.l0": np.zeros((2, 3, 3)), "s9.l0.op": np.array([0, 1])}
            recipe.write_safetensors(a, masks)
            masks["s9.l0"][1, 2, 0] = 1
            del masks["s10.l0"]
            recipe.write_safetensors(b, masks)
            lines = recipe.differences(recipe.read_safetensors(a), recipe.read_safetensors(b))
        wanted = ["s9.l0: 1 of 18 differ, first at [1, 2, 0]", "s10.l0: only in the first file"]
        self.assertEqual(lines, wanted)


@unittest.skipUnless("CALIBC_BIN" in os.environ, "CALIBC_BIN does not name a calibc to compare with")
class AgainstCalibc(unittest.TestCase):
    def test_masks_are_equal_bit_for_bit(self):
        calibc = os.environ["CALIBC_BIN"]
        with tempfile.TemporaryDirectory() as folder:
            bundle, masks, wanted = (os.path.join(folder, name) for name in ("bundle", "masks", "wanted"))
            subprocess.run([calibc, "compile", TRACES, "-o", bundle, "-q"], check=True)
            subprocess.run([calibc, "export", bundle, "--masks", masks, "-q"], check=True)
            self.assertEqual(recipe.main([str(TRACES), "-o", wanted]), 0)
            self.assertEqual(recipe.main(["--compare", masks, wanted]), 0)


if __name__ == "__main__":
    unittest.main()
