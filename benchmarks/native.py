"""What a small native helper would bring: a known graph recognised in C++ and in Python.

    python -m benchmarks.native

needs a C++ compiler. A graph of two hundred nodes is walked and all is asked that tells its
structure: classes and edges of the nodes, what gradients they take, and how the tensors that they
saved lie in memory. The package does that at each new point, see `_capture.graph` and
`_capture.matcher`. The helper here answers with one number; it lacks static arguments, custom
Functions and all that a real one would have to know, so its times are the least possible.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

from benchmarks.report import markdown, rewrite
from linearize._capture.graph import Graph
from linearize._capture.matcher import Matcher
from linearize._spaces.space import TensorSpec
from linearize._torch.graphs import saved_names

NODES, ROUNDS = 200, 300
PAGE, MARKS = Path("docs/benchmarks.md"), ("<!-- native: begin -->", "<!-- native: end -->")
SOURCE = r"""
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <typeinfo>
#include <unordered_map>
#include <vector>
using torch::autograd::Node;

static void mix(size_t& h, size_t x) { h ^= x + 0x9e3779b97f4a7c15 + (h << 6) + (h >> 2); }

using Held = decltype(torch::autograd::Edge::function);

static std::vector<Held> walked(PyObject* value) {
  std::vector<Held> order, todo{THPVariable_Unpack(value).grad_fn()};
  std::unordered_map<Node*, int> waiting;
  for (size_t k = 0; k < todo.size(); ++k) {
    Held node = todo[k];
    for (auto& e : node->next_edges())
      if (e.is_valid() && waiting[e.function.get()]++ == 0) todo.push_back(e.function);
  }
  order.push_back(todo[0]);
  for (size_t k = 0; k < order.size(); ++k) {
    Held node = order[k];
    for (auto& e : node->next_edges())
      if (e.is_valid() && --waiting[e.function.get()] == 0) order.push_back(e.function);
  }
  return order;
}

static PyObject* walk(PyObject*, PyObject* value) {
  auto order = walked(value);
  std::unordered_map<Node*, size_t> place;
  for (size_t k = 0; k < order.size(); ++k) place[order[k].get()] = k;
  size_t h = 0;
  for (auto& node : order) {
    mix(h, typeid(*node).hash_code());
    for (auto& e : node->next_edges()) mix(h, place[e.function.get()] * 64 + e.input_nr);
    for (uint32_t i = 0; i < node->num_inputs(); ++i) {
      auto& m = node->input_metadata(i);
      for (auto s : m.shape_as_dim_vector()) mix(h, s.as_int_unchecked());
      mix(h, (size_t)m.dtype().toScalarType() * 64 + (size_t)m.device().type());
    }
  }
  return PyLong_FromSize_t(h);
}

// All nodes with what each kind saved: names by class.
static PyObject* saved(PyObject*, PyObject* args) {
  PyObject *value, *names;
  if (!PyArg_ParseTuple(args, "OO", &value, &names)) return nullptr;
  size_t h = 0;
  std::unordered_map<void*, size_t> storages;
  for (auto& node : walked(value)) {
    PyObject* object = torch::autograd::functionToPyObject(node);
    PyObject* mine = PyDict_GetItem(names, (PyObject*)Py_TYPE(object));
    Py_ssize_t n = mine ? PyTuple_GET_SIZE(mine) : 0;
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* got = PyObject_GetAttr(object, PyTuple_GET_ITEM(mine, i));
      if (!got) { Py_DECREF(object); return nullptr; }
      if (THPVariable_Check(got)) {
        auto& t = THPVariable_Unpack(got);
        for (auto s : t.sizes()) mix(h, s);
        for (auto s : t.strides()) mix(h, s);
        mix(h, (size_t)t.scalar_type() * 64 + (size_t)t.storage_offset());
        void* storage = t.storage().unsafeGetStorageImpl();
        mix(h, storages.emplace(storage, storages.size()).first->second);
      }
      Py_DECREF(got);
    }
    Py_DECREF(object);
  }
  return PyLong_FromSize_t(h);
}

static PyMethodDef methods[] = {{"walk", walk, METH_O, nullptr},
                                {"saved", saved, METH_VARARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef def = {PyModuleDef_HEAD_INIT, "native_walk", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_native_walk() { return PyModule_Create(&def); }
"""


def built(place: Path) -> ModuleType:
    """Compile the helper and return it."""
    source, library = place / "native_walk.cpp", place / "native_walk.so"
    source.write_text(SOURCE, encoding="utf-8")
    where = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [
            *("c++", "-O2", "-std=c++20", "-shared", "-fPIC", "-w"),
            *(f"-I{path}" for path in where),
            *(str(source), "-o", str(library), f"-L{lib}", f"-Wl,-rpath,{lib}"),
            *("-ltorch_python", "-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("native_walk", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chain(x: torch.Tensor) -> torch.Tensor:
    """Return what two hundred operations make of a vector."""
    for _ in range(NODES // 2):
        x = (x * 1.1).sin()
    return x


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the medians of processor times in microseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            times[name].append((time.process_time_ns() - start) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def measured() -> list[list[str]]:
    """Return the table."""
    x = torch.linspace(-1, 1, 100, requires_grad=True)
    y = chain(x)
    assert y.grad_fn is not None
    spec = TensorSpec.of(y.detach())
    roots, leaves, specs = [(y.grad_fn, 0)], [x], [[spec], [spec]]

    def graph() -> Graph:
        return Graph(roots, leaves)

    known = graph()
    matcher = Matcher.of(known, specs)
    assert matcher is not None
    assert matcher(graph(), specs) is not None
    names = {kind: tuple(saved_names(kind)[0]) for kind in known.kinds}
    with tempfile.TemporaryDirectory() as place:
        native = built(Path(place))
    again = chain(x)
    assert native.walk(y) == native.walk(again) != native.walk(again.sin())
    assert native.saved(y, names) == native.saved(again, names)
    found = interleaved(
        {
            "f": lambda: chain(x),
            "graph": graph,
            "matcher": lambda: matcher(known, specs),
            "walk": lambda: native.walk(y),
            "saved": lambda: native.saved(y, names),
        }
    )
    ours, least = found["graph"] + found["matcher"], found["walk"] + found["saved"]
    return [
        ["", "in Python, µs", "in C++, µs"],
        ["walking the graph", f"{found['graph']:.0f}", ""],
        ["classes, edges, gradients", "", f"{found['walk']:.0f}"],
        ["all of that, and what the nodes saved", f"{ours:.0f}", f"{least:.0f}"],
        ["f under autograd, to compare with", f"{found['f']:.0f}", ""],
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table into the page if `--docs` is given."""
    torch.set_num_threads(1)
    rows = measured()
    print(markdown(rows))
    if "--docs" in (sys.argv[1:] if arguments is None else arguments):
        rewrite(PAGE, markdown(rows), *MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
