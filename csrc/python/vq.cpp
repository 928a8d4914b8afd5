#include "door/vq.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

template <class R>
void run(const core::VqNearest<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<char> scratch(core::vq_nearest_scratch(call, threads));
  core::vq_nearest(call, scratch.data(), team(threads));
}

template <class R>
void run(const core::VqSums<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<char> scratch(core::vq_sums_scratch(call, threads));
  core::vq_sums(call, scratch.data(), team(threads));
}

py::array integers(const std::vector<int64_t>& size, int64_t bits) {
  return bits == 16   ? py::array(py::array_t<int16_t>(size))
         : bits == 32 ? py::array(py::array_t<int32_t>(size))
                      : py::array(py::array_t<int64_t>(size));
}

py::tuple vq_nearest(const py::array& x, const py::array& codebook, const Optional& mask, bool dot, int64_t best,
                     int64_t bits, bool distance, bool score, int64_t screen, int threads) {
  const char* const op = "vq_nearest";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vc = view(op, "codebook", codebook), vm = view(op, "mask", mask);
  const door::VqSizes s = door::check_vq(op, vx, vc, vm);
  door::check_best(op, s, best, bits, screen);
  py::array index = integers({s.G, s.N, best}, bits);
  py::array found = empty(s.type, distance ? std::vector<int64_t>{s.G, s.N, best} : std::vector<int64_t>{0});
  py::array scores = empty(s.type, score ? std::vector<int64_t>{s.G, s.N, best} : std::vector<int64_t>{0});
  door::by_type(s.type, [&]<class R>(R) {
    run<R>(core::VqNearest<R>{door::vq_shape<R>(s, vx, vc, vm, dot), best, static_cast<int>(bits), index.mutable_data(),
                              distance ? pointer<R>(found) : nullptr, score ? pointer<R>(scores) : nullptr, nullptr,
                              static_cast<core::Screen>(screen)},
           threads);
  });
  return py::make_tuple(index, found, scores);
}

// How much the screen leaves open: panels of codes that are scored again beyond one per row, and rows that have such.
py::tuple vq_screen_opened(const py::array& x, const py::array& codebook, bool dot, int threads) {
  const char* const op = "vq_screen_opened";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vc = view(op, "codebook", codebook), none;
  const door::VqSizes s = door::check_vq(op, vx, vc, none);
  std::vector<int64_t> index(s.G * s.N);
  const core::VqNearest<float> call{door::vq_shape<float>(s, vx, vc, none, dot),
                                    1,
                                    64,
                                    index.data(),
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    core::Screen::always};
  if (s.type != door::Type::f32 || !core::vq_screens(call)) door::fail(op, "there is no screen for this call");
  int64_t opened[2];
  {
    const py::gil_scoped_release release;
    const door::Scratch<char> scratch(core::vq_screen_scratch(call, threads));
    core::vq_screen(call, scratch.data(), team(threads), opened);
  }
  return py::make_tuple(opened[0], opened[1]);
}

// A codebook that stays prepared from call to call, for lookups of few rows.
class Codebook {
 public:
  Codebook(const py::array& codebook, bool dot) : codebook_(codebook), dot_(dot) {
    const char* const op = "Codebook";
    check_call(op, 1);
    codes_ = view(op, "codebook", codebook_);
    door::expect_dims(op, "codebook", codes_, "[G, K, D]", 3);
    door::Array none = codes_;
    none.size[1] = 0;
    sizes_ = door::check_vq(op, none, codes_, door::Array{});
    by_type(sizes_.type, [&]<class R>(R) {
      const core::VqShape<R> shape = door::vq_shape<R>(sizes_, door::Array{}, codes_, door::Array{}, dot_);
      prepared_ = py::array_t<R>(static_cast<py::ssize_t>(core::vq_prepared_size(shape)));
      core::vq_prepare(shape, pointer<R>(prepared_));
    });
  }

  py::tuple nearest(const py::array& x, int64_t best, int64_t bits, bool distance, int threads) const {
    const char* const op = "Codebook.nearest";
    check_call(op, threads);
    const door::Array vx = view(op, "x", x), none;
    const door::VqSizes s = door::check_vq(op, vx, codes_, none);
    door::check_best(op, s, best, bits, 2);
    py::array index = integers({s.G, s.N, best}, bits);
    py::array found = empty(s.type, distance ? std::vector<int64_t>{s.G, s.N, best} : std::vector<int64_t>{0});
    by_type(s.type, [&]<class R>(R) {
      core::VqNearest<R> call{door::vq_shape<R>(s, vx, codes_, none, dot_),
                              best,
                              static_cast<int>(bits),
                              index.mutable_data(),
                              distance ? pointer<R>(found) : nullptr,
                              nullptr,
                              nullptr};
      call.prepared = static_cast<const R*>(prepared_.data());
      run<R>(call, threads);
    });
    return py::make_tuple(index, found);
  }

 private:
  py::array codebook_, prepared_;
  door::Array codes_;
  door::VqSizes sizes_{};
  bool dot_;
};

py::tuple vq_quantize(const py::array& x, const py::array& codebook, const Optional& mask, bool dot, bool sums,
                      int threads) {
  const char* const op = "vq_quantize";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vc = view(op, "codebook", codebook), vm = view(op, "mask", mask);
  const door::VqSizes s = door::check_vq(op, vx, vc, vm);
  py::array codes = empty(s.type, {s.G, s.N, s.D}), distance = empty(s.type, {s.G, s.N});
  py::array index = integers({s.G, s.N}, 64);
  py::array counts = empty(s.type, sums ? std::vector<int64_t>{s.G, s.K} : std::vector<int64_t>{0});
  py::array total = empty(s.type, sums ? std::vector<int64_t>{s.G, s.K, s.D} : std::vector<int64_t>{0});
  door::by_type(s.type, [&]<class R>(R) {
    const auto* const k = static_cast<const int64_t*>(index.data());
    run<R>(core::VqNearest<R>{door::vq_shape<R>(s, vx, vc, vm, dot), 1, 64, index.mutable_data(), pointer<R>(distance),
                              nullptr, pointer<R>(codes)},
           threads);
    if (!sums) return;
    run<R>(core::VqSums<R>{s.G, s.N, s.K, s.D, vx.as<R>(), nullptr, nullptr, nullptr, R(1), k, pointer<R>(counts),
                           pointer<R>(total)},
           threads);
  });
  return py::make_tuple(codes, index, distance, counts, total);
}

py::tuple vq_sums(const py::array& x, const py::array& index, int64_t K, int threads) {
  const char* const op = "vq_sums";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vi = view(op, "index", index);
  const door::VqSizes s = door::check_index(op, "x", vx, vi, K);
  py::array counts = empty(s.type, {s.G, K}), sums = empty(s.type, {s.G, K, s.D});
  door::by_type(s.type, [&]<class R>(R) {
    run<R>(core::VqSums<R>{s.G, s.N, K, s.D, vx.as<R>(), nullptr, nullptr, nullptr, R(1), vi.as<int64_t>(),
                           pointer<R>(counts), pointer<R>(sums)},
           threads);
  });
  return py::make_tuple(counts, sums);
}

}  // namespace

void bind_vq(py::module_& m) {
  using py::arg;
  py::class_<Codebook>(m, "Codebook")
      .def(py::init<const py::array&, bool>(), arg("codebook").noconvert(), arg("dot") = false)
      .def("nearest", &Codebook::nearest, arg("x").noconvert(), arg("best") = 1, arg("bits") = 64,
           arg("distance") = false, py::kw_only(), arg("threads") = 1);
  m.def("vq_nearest", &vq_nearest, arg("x").noconvert(), arg("codebook").noconvert(),
        arg("mask").noconvert() = py::none(), arg("dot") = false, arg("best") = 1, arg("bits") = 64,
        arg("distance") = false, arg("score") = false, arg("screen") = 2, py::kw_only(), arg("threads") = 1);
  m.def("vq_screen_opened", &vq_screen_opened, arg("x").noconvert(), arg("codebook").noconvert(), arg("dot") = false,
        py::kw_only(), arg("threads") = 1);
  m.def("vq_quantize", &vq_quantize, arg("x").noconvert(), arg("codebook").noconvert(),
        arg("mask").noconvert() = py::none(), arg("dot") = false, arg("sums") = false, py::kw_only(),
        arg("threads") = 1);
  m.def("vq_sums", &vq_sums, arg("x").noconvert(), arg("index").noconvert(), arg("K"), py::kw_only(),
        arg("threads") = 1);
}

}  // namespace fastseq::python_door
