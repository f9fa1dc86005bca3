// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Scalar functions of half, float and all integer types against double or wide integers.
#include <array>
#include <functional>

#include "tests/conformance_support.h"

namespace metal_emulator::conformance {
namespace {

constexpr double kPi = 3.14159265358979323846;

struct MathFunction {
  const char* expression;
  std::function<double(double, double, double)> exact;
  double float_ulps;  ///< what glibc 2.36 documents for its float functions, rounded up; 0.5: exact
};

double median(double x, double y, double z) {
  return std::fmax(std::fmin(x, y), std::fmin(std::fmax(x, y), z));
}

const std::vector<MathFunction>& functions() {
  static const std::vector<MathFunction> table = {
      {"acos(x)", [](double x, double, double) { return std::acos(x); }, 1},
      {"acosh(x)", [](double x, double, double) { return std::acosh(x); }, 2},
      {"asin(x)", [](double x, double, double) { return std::asin(x); }, 1},
      {"asinh(x)", [](double x, double, double) { return std::asinh(x); }, 2},
      {"atan(x)", [](double x, double, double) { return std::atan(x); }, 1},
      {"atanh(x)", [](double x, double, double) { return std::atanh(x); }, 2},
      {"ceil(x)", [](double x, double, double) { return std::ceil(x); }, 0},
      {"cos(x)", [](double x, double, double) { return std::cos(x); }, 1},
      {"cosh(x)", [](double x, double, double) { return std::cosh(x); }, 2},
      {"exp(x)", [](double x, double, double) { return std::exp(x); }, 1},
      {"exp10(x)", [](double x, double, double) { return std::pow(10.0, x); }, 0.51},
      {"exp2(x)", [](double x, double, double) { return std::exp2(x); }, 1},
      {"fabs(x)", [](double x, double, double) { return std::fabs(x); }, 0},
      {"abs(x)", [](double x, double, double) { return std::fabs(x); }, 0},
      {"floor(x)", [](double x, double, double) { return std::floor(x); }, 0},
      {"log(x)", [](double x, double, double) { return std::log(x); }, 1},
      {"log10(x)", [](double x, double, double) { return std::log10(x); }, 2},
      {"log2(x)", [](double x, double, double) { return std::log2(x); }, 1},
      {"rint(x)", [](double x, double, double) { return std::nearbyint(x); }, 0},
      {"round(x)", [](double x, double, double) { return std::round(x); }, 0},
      {"rsqrt(x)", [](double x, double, double) { return 1 / std::sqrt(x); }, 0.51},
      {"sin(x)", [](double x, double, double) { return std::sin(x); }, 1},
      {"sinh(x)", [](double x, double, double) { return std::sinh(x); }, 2},
      {"sqrt(x)", [](double x, double, double) { return std::sqrt(x); }, 0.5},
      {"tan(x)", [](double x, double, double) { return std::tan(x); }, 1},
      {"tanh(x)", [](double x, double, double) { return std::tanh(x); }, 2},
      {"trunc(x)", [](double x, double, double) { return std::trunc(x); }, 0},
      {"sign(x)",
       [](double x, double, double) {
         return x > 0 ? 1.0 : x < 0 ? -1.0 : std::isnan(x) ? 0.0 : x;
       },
       0},
      {"saturate(x)", [](double x, double, double) { return std::fmin(std::fmax(x, 0), 1); }, 0},
      {"atan2(x, y)", [](double x, double y, double) { return std::atan2(x, y); }, 1},
      {"copysign(x, y)", [](double x, double y, double) { return std::copysign(x, y); }, 0},
      {"divide(x, y)", [](double x, double y, double) { return x / y; }, 0.5},
      {"fdim(x, y)", [](double x, double y, double) { return std::fdim(x, y); }, 0.5},
      {"fmax(x, y)", [](double x, double y, double) { return std::fmax(x, y); }, 0},
      {"fmin(x, y)", [](double x, double y, double) { return std::fmin(x, y); }, 0},
      {"max(x, y)", [](double x, double y, double) { return std::fmax(x, y); }, 0},
      {"min(x, y)", [](double x, double y, double) { return std::fmin(x, y); }, 0},
      {"fmod(x, y)", [](double x, double y, double) { return std::fmod(x, y); }, 0},
      {"pow(x, y)", [](double x, double y, double) { return std::pow(x, y); }, 1},
      {"powr(x, y)", [](double x, double y, double) { return x < 0 ? NAN : std::pow(x, y); }, 1},
      {"step(x, y)", [](double x, double y, double) { return y < x ? 0.0 : 1.0; }, 0},
      {"fma(x, y, z)", [](double x, double y, double z) { return std::fma(x, y, z); }, 0.51},
      {"fmax3(x, y, z)",
       [](double x, double y, double z) { return std::fmax(x, std::fmax(y, z)); },
       0},
      {"fmin3(x, y, z)",
       [](double x, double y, double z) { return std::fmin(x, std::fmin(y, z)); },
       0},
      {"max3(x, y, z)",
       [](double x, double y, double z) { return std::fmax(x, std::fmax(y, z)); },
       0},
      {"min3(x, y, z)",
       [](double x, double y, double z) { return std::fmin(x, std::fmin(y, z)); },
       0},
      {"median3(x, y, z)", median, 0},
      {"fmedian3(x, y, z)", median, 0},
      {"clamp(x, min(y, z), max(y, z))",
       [](double x, double y, double z) {
         return std::fmin(std::fmax(x, std::fmin(y, z)), std::fmax(y, z));
       },
       0},
  };
  return table;
}

const std::vector<float>& samples() {
  static const std::vector<float> values = {
      0.0f,  -0.0f,  0.5f,   -0.5f,   1.0f,  -1.0f,  1.5f,   2.5f,     -2.5f,     0.1f,
      -0.3f, 0.75f,  3.0f,   -7.25f,  10.0f, 31.0f,  -42.5f, 100.0f,   0.001f,    6e-5f,
      1e-3f, 0.999f, 2.0f,   1234.5f, -9.0f, 0.25f,  0.125f, INFINITY, -INFINITY, NAN,
      4.0f,  8.0f,   0.333f, -0.999f, 5.5f,  -88.0f, 88.0f,  60000.0f, -60000.0f, 0.6f};
  return values;
}

struct Inputs {
  std::vector<float> x, y, z;
};
/// All pairs of samples; z walks through them at its own pace.
Inputs pairs() {
  Inputs in;
  const auto& s = samples();
  for (size_t i = 0; i < s.size(); i++)
    for (size_t j = 0; j < s.size(); j++) {
      in.x.push_back(s[i]);
      in.y.push_back(s[j]);
      in.z.push_back(s[(i * 7 + j * 3) % s.size()]);
    }
  return in;
}

/// sNaN aside, fmax and friends take the number where the other is a NaN: as std::fmax.
TEST(MathConformance, FloatFunctions) {
  const Inputs v = pairs();
  for (const std::string prefix : {"", "precise::", "fast::"}) {
    std::vector<std::string> text;
    for (const MathFunction& f : functions()) text.push_back(prefix + f.expression);
    const auto got = evaluate<float, float>("float", "float", text, v.x, v.y, v.z);
    for (size_t f = 0; f < text.size(); f++)
      for (size_t i = 0; i < v.x.size(); i++) {
        const double exact = functions()[f].exact(v.x[i], v.y[i], v.z[i]);
        ASSERT_LE(float_ulps(got[f][i], exact), functions()[f].float_ulps)
            << text[f] << " at " << v.x[i] << ", " << v.y[i] << ", " << v.z[i] << ": " << got[f][i]
            << " for " << exact;
      }
  }
}

TEST(MathConformance, HalfFunctions) {
  const Inputs v = pairs();
  std::vector<uint16_t> x, y, z;
  for (size_t i = 0; i < v.x.size(); i++) {
    x.push_back(float_to_half(v.x[i]));
    y.push_back(float_to_half(v.y[i]));
    z.push_back(float_to_half(v.z[i]));
  }
  std::vector<std::string> text;
  for (const MathFunction& f : functions()) text.push_back(f.expression);
  const auto got = evaluate<uint16_t, uint16_t>("half", "half", text, x, y, z);
  // One rounding of a float result that is itself off by a few of 2^13 times smaller steps.
  constexpr double kBound = 0.5 + 3.0 / 8192;
  for (size_t f = 0; f < text.size(); f++)
    for (size_t i = 0; i < x.size(); i++) {
      const double exact =
          functions()[f].exact(half_to_float(x[i]), half_to_float(y[i]), half_to_float(z[i]));
      // Next to the largest half, rounding may go either way of the bound to infinity.
      if (std::fabs(std::fabs(exact) - 65520) < 1) continue;
      ASSERT_LE(half_ulps(half_to_float(got[f][i]), exact), kBound)
          << text[f] << " at " << half_to_float(x[i]) << ", " << half_to_float(y[i]) << ": "
          << half_to_float(got[f][i]) << " for " << exact;
    }
}

TEST(MathConformance, FunctionsWithTheirOwnRules) {
  const std::vector<float> x = {0.0f, 0.25f, 0.5f, -1.75f, 3.5f, 100.25f, -0.1f, 8.0f, 1e-3f, 2.0f};
  const std::vector<float> y = {1.0f, 2.0f, -1.0f, 0.5f, 4.0f, -3.0f, 9.0f, 0.0f, 7.0f, 2.5f};
  const std::vector<float> z = {0.5f, 0.25f, 0.0f, 1.0f, 0.75f, 0.1f, 0.9f, 0.3f, 0.6f, 0.2f};
  const std::vector<std::string> text = {
      "sinpi(x)",
      "cospi(x)",
      "tanpi(x)",
      "fract(x)",
      "mix(x, y, z)",
      "smoothstep(0.0f, 4.0f, x)",
      "ldexp(x, 3)",
      "ilogb(x + 200)",
      "nextafter(x, y)",
      "nextafter((half)x, (half)y)",
      "fract((half)x)",
      // Functions with a second result.
      "({ int e; frexp(x, e); })",
      "({ int e; frexp(x, e); e; })",
      "({ float w; modf(x, w); })",
      "({ float w; modf(x, w); w; })",
      "({ float c; sincos(x, c); })",
      "({ float c; sincos(x, c); c; })"};
  // Statement expressions are no Metal: only this test's way to reach the second results.
  std::string body;
  std::vector<float> flat(text.size() * x.size());
  for (size_t e = 0; e < text.size(); e++)
    body += "out[" + std::to_string(e) + " * n + i] = (float)(" + text[e] + ");\n";
  CompileOptions options;
  options.lint = false;
  const Library library = compile(
      "#include <metal_stdlib>\nusing namespace metal;\nkernel void own(const device float* xs "
      "[[buffer(0)]], const device float* ys [[buffer(1)]], const device float* zs [[buffer(2)]], "
      "device float* out [[buffer(3)]], uint i [[thread_position_in_grid]], uint n "
      "[[threads_per_grid]]) { float x = xs[i], y = ys[i], z = zs[i];\n" +
          body + "}\n",
      options);
  Dispatch d;
  d.kernel = "own";
  d.buffers = {in(0, x), in(1, y), in(2, z), out(3, flat)};
  d.threads_per_grid = {uint32_t(x.size()), 1, 1};
  d.threads_per_threadgroup = {uint32_t(x.size()), 1, 1};
  const Report report = run(library, d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  const auto got = [&](size_t e, size_t i) { return flat[e * x.size() + i]; };
  for (size_t i = 0; i < x.size(); i++) {
    SCOPED_TRACE(x[i]);
    const double a = x[i];
    // In double, k·π is off by 1e-16·k: an absolute error far below a float's last place of 1.
    EXPECT_NEAR(got(0, i), std::sin(kPi * a), 6e-8 + 1e-15 * std::fabs(a));
    EXPECT_NEAR(got(1, i), std::cos(kPi * a), 6e-8 + 1e-15 * std::fabs(a));
    if (std::fabs(std::cos(kPi * a)) > 1e-6) {
      EXPECT_NEAR(got(2, i), std::tan(kPi * a), 4e-7 * (1 + std::fabs(std::tan(kPi * a))));
    }
    EXPECT_EQ(got(3, i), std::fmin(float(a - std::floor(a)), 0x1.fffffep-1f));
    EXPECT_EQ(got(4, i), x[i] + (y[i] - x[i]) * z[i]);
    const float t = std::fmin(std::fmax(x[i] / 4.0f, 0.0f), 1.0f);
    EXPECT_EQ(got(5, i), t * t * (3.0f - 2.0f * t));
    EXPECT_EQ(got(6, i), std::ldexp(x[i], 3));
    EXPECT_EQ(got(7, i), std::ilogb(x[i] + 200));
    EXPECT_EQ(got(8, i), std::nextafter(x[i], y[i]));
    const float h = half_to_float(float_to_half(a)), hy = half_to_float(float_to_half(y[i]));
    if (h != hy) {
      EXPECT_EQ(std::abs(float_to_half(got(9, i)) - float_to_half(h)), 1) << got(9, i);
    }
    EXPECT_EQ(got(9, i) > h, hy > h);
    EXPECT_EQ(got(10, i), half_to_float(float_to_half(std::fmin(h - std::floor(h), 0x1.ffcp-1))));
    int e;
    EXPECT_EQ(got(11, i), std::frexp(x[i], &e));
    EXPECT_EQ(got(12, i), float(e));
    float w;
    EXPECT_EQ(got(13, i), std::modf(x[i], &w));
    EXPECT_EQ(got(14, i), w);
    EXPECT_LE(float_ulps(got(15, i), std::sin(a)), 1);
    EXPECT_LE(float_ulps(got(16, i), std::cos(a)), 1);
  }
}

TEST(MathConformance, Relational) {
  const Inputs v = pairs();
  const std::vector<std::string> text = {
      "isnan(x)",
      "isinf(x)",
      "isfinite(x)",
      "isnormal(x)",
      "signbit(x)",
      "isordered(x, y)",
      "isunordered(x, y)",
      "select(x, y, z > 1.0f)",
      "all(x > y)",
      "any(x > y)"};
  const auto got = evaluate<float, float>("float", "float", text, v.x, v.y, v.z);
  for (size_t i = 0; i < v.x.size(); i++) {
    const float x = v.x[i], y = v.y[i], z = v.z[i];
    ASSERT_EQ(got[0][i], float(std::isnan(x)));
    ASSERT_EQ(got[1][i], float(std::isinf(x)));
    ASSERT_EQ(got[2][i], float(std::isfinite(x)));
    ASSERT_EQ(got[3][i], float(std::isnormal(x)));
    ASSERT_EQ(got[4][i], float(std::signbit(x)));
    ASSERT_EQ(got[5][i], float(!std::isunordered(x, y)));
    ASSERT_EQ(got[6][i], float(std::isunordered(x, y)));
    const float selected = z > 1.0f ? y : x;
    if (!std::isnan(selected)) {
      ASSERT_EQ(got[7][i], selected);
    }
    ASSERT_EQ(got[8][i], float(x > y));
    ASSERT_EQ(got[9][i], float(x > y));
  }
}

// ---- Integers: the expected value in a wider type.
template <class T>
struct IntegerFunction {
  const char* expression;
  std::function<T(T, T, T)> exact;
};
using Wide = __int128;

template <class T>
T clamp_to(Wide x) {
  const Wide low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(x < low ? low : x > high ? high : x);
}
template <class T>
Wide floor_half(Wide x) {
  return (x - (x & 1)) / 2;
}

template <class T>
std::vector<IntegerFunction<T>> integer_functions() {
  using U = std::make_unsigned_t<T>;
  constexpr int kBits = sizeof(T) * 8;
  const auto bit = [](T x, int i) { return (static_cast<U>(x) >> i) & 1; };
  return {
      {"min(x, y)", [](T x, T y, T) { return std::min(x, y); }},
      {"max(x, y)", [](T x, T y, T) { return std::max(x, y); }},
      {"clamp(x, min(y, z), max(y, z))",
       [](T x, T y, T z) { return std::min(std::max(x, std::min(y, z)), std::max(y, z)); }},
      {"min3(x, y, z)",
       [](T x, T y, T z) {
         return std::min({x, y, z});
       }},
      {"max3(x, y, z)",
       [](T x, T y, T z) {
         return std::max({x, y, z});
       }},
      {"median3(x, y, z)",
       [](T x, T y, T z) { return std::max(std::min(x, y), std::min(std::max(x, y), z)); }},
      {"abs(x)", [](T x, T, T) { return static_cast<T>(x < 0 ? -Wide(x) : Wide(x)); }},
      {"absdiff(x, y)",
       [](T x, T y, T) { return static_cast<T>(x > y ? Wide(x) - y : Wide(y) - x); }},
      {"addsat(x, y)", [](T x, T y, T) { return clamp_to<T>(Wide(x) + y); }},
      {"subsat(x, y)", [](T x, T y, T) { return clamp_to<T>(Wide(x) - y); }},
      {"hadd(x, y)", [](T x, T y, T) { return static_cast<T>(floor_half<T>(Wide(x) + y)); }},
      {"rhadd(x, y)", [](T x, T y, T) { return static_cast<T>(floor_half<T>(Wide(x) + y + 1)); }},
      {"clz(x)",
       [bit](T x, T, T) {
         int n = 0;
         while (n < kBits && !bit(x, kBits - 1 - n)) n++;
         return static_cast<T>(n);
       }},
      {"ctz(x)",
       [bit](T x, T, T) {
         int n = 0;
         while (n < kBits && !bit(x, n)) n++;
         return static_cast<T>(n);
       }},
      {"popcount(x)",
       [bit](T x, T, T) {
         int n = 0;
         for (int i = 0; i < kBits; i++) n += int(bit(x, i));
         return static_cast<T>(n);
       }},
      {"reverse_bits(x)",
       [bit](T x, T, T) {
         U r = 0;
         for (int i = 0; i < kBits; i++) r = static_cast<U>(r | U(bit(x, i)) << (kBits - 1 - i));
         return static_cast<T>(r);
       }},
      {"rotate(x, y)",
       [bit](T x, T y, T) {
         U r = 0;
         const int n = int(static_cast<U>(y) % kBits);
         for (int i = 0; i < kBits; i++) r = static_cast<U>(r | U(bit(x, i)) << ((i + n) % kBits));
         return static_cast<T>(r);
       }},
      {"extract_bits(x, 2, 5)",
       [bit](T x, T, T) {
         int v = 0;
         for (int i = 0; i < 5; i++) v |= int(bit(x, i + 2)) << i;
         return static_cast<T>(std::is_signed_v<T> && (v & 16) ? v - 32 : v);
       }},
      {"insert_bits(x, y, 1, 6)",
       [bit](T x, T y, T) {
         U r = static_cast<U>(x);
         for (int i = 0; i < 6; i++) {
           r = static_cast<U>(r & ~(U(1) << (i + 1)));
           r = static_cast<U>(r | U(bit(y, i)) << (i + 1));
         }
         return static_cast<T>(r);
       }},
      {"mulhi(x, y)",
       [](T x, T y, T) {
         if constexpr (std::is_signed_v<T> || kBits < 64)
           return static_cast<T>(Wide(x) * Wide(y) >> kBits);
         else
           return static_cast<T>((unsigned __int128)(x)*y >> kBits);
       }},
      {"madhi(x, y, z)",
       [](T x, T y, T z) {
         if constexpr (std::is_signed_v<T> || kBits < 64)
           return static_cast<T>(static_cast<U>(Wide(x) * Wide(y) >> kBits) + static_cast<U>(z));
         else
           return static_cast<T>(static_cast<U>((unsigned __int128)(x)*y >> kBits) + z);
       }},
  };
}

template <class T>
void check_integers(const std::string& name) {
  SCOPED_TRACE(name);
  using L = std::numeric_limits<T>;
  const std::vector<T> s = {
      T(0),
      T(1),
      T(2),
      T(5),
      T(31),
      T(77),
      T(100),
      L::max(),
      L::min(),
      T(L::max() - 1),
      T(L::min() + 1),
      T(L::max() / 3),
      T(-1),
      T(-7),
      T(64)};
  std::vector<T> x, y, z;
  for (size_t i = 0; i < s.size(); i++)
    for (size_t j = 0; j < s.size(); j++) {
      x.push_back(s[i]);
      y.push_back(s[j]);
      z.push_back(s[(i * 5 + j * 2) % s.size()]);
    }
  const auto table = integer_functions<T>();
  std::vector<std::string> text;
  for (const auto& f : table) text.push_back(f.expression);
  const auto got = evaluate<T, T>(name, name, text, x, y, z);
  for (size_t f = 0; f < table.size(); f++)
    for (size_t i = 0; i < x.size(); i++)
      ASSERT_EQ(int64_t(got[f][i]), int64_t(table[f].exact(x[i], y[i], z[i])))
          << text[f] << " at " << int64_t(x[i]) << ", " << int64_t(y[i]) << ", " << int64_t(z[i]);
}

TEST(IntegerConformance, Char) {
  check_integers<int8_t>("char");
}
TEST(IntegerConformance, Uchar) {
  check_integers<uint8_t>("uchar");
}
TEST(IntegerConformance, Short) {
  check_integers<int16_t>("short");
}
TEST(IntegerConformance, Ushort) {
  check_integers<uint16_t>("ushort");
}
TEST(IntegerConformance, Int) {
  check_integers<int32_t>("int");
}
TEST(IntegerConformance, Uint) {
  check_integers<uint32_t>("uint");
}
TEST(IntegerConformance, Long) {
  check_integers<int64_t>("long");
}
TEST(IntegerConformance, Ulong) {
  check_integers<uint64_t>("ulong");
}

TEST(IntegerConformance, Factors24AndSaturatedProducts) {
  const std::vector<int32_t> x = {0, 1, -1, 8388607, -8388608, 12345, -777};
  const std::vector<int32_t> y = {5, -3, 8388607, 2, 100, -4, 99};
  const std::vector<int32_t> z = {1, 2, 3, -4, 5, 6, 7};
  const auto got = evaluate<int32_t, int32_t>(
      "int",
      "int",
      {"mul24(x, y)", "mad24(x, y, z)", "madsat(x, y, z)", "mul24(uint(x), uint(y))"},
      x,
      y,
      z);
  for (size_t i = 0; i < x.size(); i++) {
    const int64_t product = int64_t(x[i]) * y[i];
    EXPECT_EQ(got[0][i], int32_t(product));
    EXPECT_EQ(got[1][i], int32_t(product + z[i]));
    EXPECT_EQ(got[2][i], clamp_to<int32_t>(Wide(product) + z[i]));
    EXPECT_EQ(uint32_t(got[3][i]), (uint32_t(x[i]) & 0xffffff) * (uint32_t(y[i]) & 0xffffff));
  }
}

}  // namespace
}  // namespace metal_emulator::conformance
