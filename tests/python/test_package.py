"""The package without tensors: import, command line, bundles, compiling, errors."""

import ast
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import calibc
from calibc import _native

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT / "examples" / "traces"


def command(*args, **options):
    """Runs the console command of the package."""
    words = [sys.executable, "-m", "calibc", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


class Import(unittest.TestCase):
    def test_the_version_is_that_of_the_workspace(self):
        line = next(line for line in (ROOT / "Cargo.toml").read_text().splitlines() if line.startswith("version"))
        self.assertEqual(calibc.__version__, line.split('"')[1])
        self.assertEqual(command("--version").stdout.split(), ["calibc", calibc.__version__])

    def test_torch_is_imported_by_what_needs_it(self):
        script = "import sys, calibc; assert 'torch' not in sys.modules; calibc.plan_from_mask; assert 'torch' in sys.modules"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

    def test_every_public_name_is_there(self):
        for name in calibc.__all__:
            self.assertTrue(hasattr(calibc, name), name)
        self.assertLessEqual(set(calibc.__all__), set(dir(calibc)))
        with self.assertRaisesRegex(AttributeError, "no attribute 'nonsense'"):
            calibc.nonsense

    def test_the_stubs_describe_the_native_module(self):
        package = Path(calibc.__file__).parent
        self.assertTrue((package / "py.typed").is_file())
        stub = ast.parse((package / "_native.pyi").read_text())

        def names(body):
            """What a module or a class declares; types private to the stub aside."""
            declared = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            return declared | {node.target.id for node in body if isinstance(node, ast.AnnAssign)}

        typed = names(stub.body)
        members = {node.name: names(node.body) for node in stub.body if isinstance(node, ast.ClassDef)}
        there = {name for name in dir(_native) if not name.startswith("__")} | {"__version__"}
        self.assertEqual(typed, there)
        for name, typed in members.items():
            there = {part for part in vars(getattr(_native, name)) if not part.startswith("__")}
            self.assertEqual({part for part in typed if not part.startswith("__")}, there, name)


class CommandLine(unittest.TestCase):
    def test_exit_codes_are_those_of_the_command(self):
        with tempfile.TemporaryDirectory() as folder:
            rubbish = Path(folder, "rubbish")
            rubbish.write_bytes(b"rubbish")
            nowhere = Path(folder, "nowhere")
            for args, code in [
                (["doctor"], 0),
                (["nonsense"], 2),
                (["inspect", rubbish], 3),
                (["doctor", "--nvrtc", nowhere], 4),
                (["inspect", nowhere], 5),
            ]:
                done = command(*args)
                self.assertEqual(done.returncode, code, f"{args}: {done.stderr}")

    def test_it_is_installed_as_calibc(self):
        script = Path(sys.executable).with_name("calibc")
        if not script.exists():
            script = Path(calibc.__file__).parents[1] / "bin" / "calibc"
        done = subprocess.run([sys.executable, script, "schema"], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("properties", json.loads(done.stdout))

    def test_ctrl_c_ends_it_at_once(self):
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder, "spec.yaml")
            os.mkfifo(pipe)
            words = [sys.executable, "-m", "calibc", "compile", "--spec", pipe, "-o", Path(folder, "out")]
            running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            # It waits for a spec that never comes: once this end opens, it is reading.
            with open(pipe, "wb"):
                running.send_signal(signal.SIGINT)
                self.assertEqual(running.wait(timeout=30), -signal.SIGINT)


class Compile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.path = Path(cls.folder.name, "plan.bundle")
        cls.bundle = calibc.compile(TRACES, out=cls.path, target="sm_80")

    def test_it_is_the_same_compiler_as_the_command(self):
        other = Path(self.folder.name, "other.bundle")
        done = command("compile", TRACES, "-o", other, "--arch", "sm_80", "-q")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(other.read_bytes(), self.path.read_bytes())

    def test_a_bundle_tells_what_it_is_for(self):
        manifest = json.loads((TRACES / "manifest.json").read_text())
        model, geometry, bundle = manifest["model"], manifest["geometry"], calibc.Bundle(self.path)
        self.assertEqual(bundle.model_name, model["name"])
        self.assertEqual(
            [bundle.layers, bundle.heads, bundle.head_dim], [model[n] for n in ("layers", "heads", "head_dim")]
        )
        self.assertEqual(
            [bundle.frames, bundle.height, bundle.width], [geometry[n] for n in ("frames", "height", "width")]
        )
        tokens = geometry["frames"] * geometry["height"] * geometry["width"]
        self.assertEqual((bundle.q_tokens, bundle.kv_tokens, bundle.text_tokens), (tokens, tokens, 0))
        self.assertEqual((bundle.text_position, bundle.layout), ("none", "raster"))
        self.assertEqual(
            (bundle.steps, bundle.sigmas), (len(manifest["steps"]), [s["sigma"] for s in manifest["steps"]])
        )
        self.assertEqual(bundle.digest, self.bundle.digest)
        self.assertNotEqual(bundle.handle, self.bundle.handle)
        self.assertTrue(bundle.has_kernels((8, 0)) and bundle.has_kernels((8, 9)) and not bundle.has_kernels((9, 0)))
        self.assertTrue(all(arch == "sm_80" for _, arch in bundle.kernels))
        self.assertIn("model:", bundle.spec)
        self.assertIn(bundle.model_name, repr(bundle))
        self.assertEqual(calibc.Bundle.parse(self.path.read_bytes()).digest, bundle.digest)

    def test_densities_and_masks_agree_with_the_command(self):
        told = json.loads(command("inspect", self.path, "--json").stdout)
        bundle, blocks = self.bundle, -(-self.bundle.q_tokens // 128)
        sites = [(step, layer) for step in range(bundle.steps) for layer in range(bundle.layers)]
        mean = sum(bundle.density(*site) for site in sites) / len(sites)
        self.assertAlmostEqual(mean, told["density"], places=12)
        self.assertEqual({sum(bundle.op_counts(*site)) for site in sites}, {bundle.heads})
        for step, layer in sites[:: max(1, len(sites) // 7)]:
            dense, _, anchors = bundle.op_counts(step, layer)
            kept = [sum(bundle.mask(step, layer, head)) / blocks**2 for head in range(bundle.heads)]
            self.assertGreaterEqual(sum(share == 1 for share in kept), dense + anchors)
            if not anchors:
                self.assertAlmostEqual(sum(kept) / len(kept), bundle.density(step, layer), places=12)

    def test_what_is_out_of_range_is_refused(self):
        for call, what in [
            (lambda: self.bundle.density(10**6, 0), "step 1000000 is out of range"),
            (lambda: self.bundle.op_counts(0, 10**6), "layer 1000000 is out of range"),
            (lambda: self.bundle.mask(0, 0, 10**6), "head 1000000 is out of range"),
        ]:
            with self.assertRaisesRegex(calibc.BadInput, what):
                call()

    def test_ctrl_c_stops_a_compile(self):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out.bundle")
            cache = Path(folder, "cache")
            # Stopped when the first of dozens of kernels is there.
            script = (
                "import calibc, os, pathlib, signal, threading, time\n"
                # Jobs in the background of a shell start with the signal ignored.
                "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                f"cache = pathlib.Path({str(cache)!r})\n"
                "def interrupt():\n"
                "    while not any(path.is_file() for path in cache.rglob('*')):\n"
                "        time.sleep(0.01)\n"
                "    os.kill(os.getpid(), signal.SIGINT)\n"
                "threading.Thread(target=interrupt, daemon=True).start()\n"
                "try:\n"
                f"    calibc.compile({str(TRACES)!r}, out={str(out)!r}, cache_dir=cache,\n"
                "        target=['sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_90a', 'sm_100', 'sm_120'])\n"
                "except KeyboardInterrupt:\n"
                "    print('stopped')\n"
            )
            start = time.monotonic()
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
            self.assertEqual((done.returncode, done.stdout), (0, "stopped\n"), done.stderr)
            self.assertEqual([path.name for path in Path(folder).iterdir() if path.name != "cache"], [])
            self.assertLess(time.monotonic() - start, 60)


class Errors(unittest.TestCase):
    def test_every_family_has_its_class_and_exit_code(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            rubbish = folder / "rubbish"
            rubbish.write_bytes(b"rubbish")
            for call, error, builtin, code, words in [
                (lambda: calibc.compile(out=folder / "x"), calibc.Usage, ValueError, 2, "give a folder of traces"),
                (lambda: calibc.compile(TRACES, out=folder / "x", target="sm_1"), calibc.Usage, ValueError, 2, "sm_1"),
                (lambda: calibc.Bundle(rubbish), calibc.BadInput, ValueError, 3, "rubbish"),
                (lambda: calibc.Bundle.parse(b"rubbish"), calibc.BadInput, ValueError, 3, "not a"),
                (
                    lambda: calibc.compile(TRACES, folder / "x", nvrtc=folder),
                    calibc.Environment,
                    RuntimeError,
                    4,
                    "nvrtc",
                ),
                (lambda: calibc.Bundle(folder / "none"), calibc.FileSystem, OSError, 5, "No such file"),
                (lambda: calibc.compile(TRACES, out=folder), calibc.FileSystem, OSError, 5, "directory"),
            ]:
                with self.assertRaises(error) as caught:
                    call()
                self.assertIsInstance(caught.exception, builtin)
                self.assertIsInstance(caught.exception, calibc.CalibcError)
                self.assertEqual(caught.exception.exit_code, code)
                self.assertIn(words, str(caught.exception))
            self.assertEqual([path.name for path in folder.iterdir()], ["rubbish"])

    def test_a_gpu_that_is_not_there(self):
        kept = ctypes.create_string_buffer(b"\x01")
        options = {"lse": False, "arch": None, "device": None, "portable": False}
        plan = _native.plan_from_mask(ctypes.addressof(kept), [1, 1, 1], 128, 128, 64, "bf16", **options)
        with self.assertRaises(calibc.Environment):
            _native.load(plan.handle, 4096, None)
        with self.assertRaisesRegex(calibc.Usage, "no bundle has the handle -1"):
            _native.load(-1, 0, None)


if __name__ == "__main__":
    unittest.main()
