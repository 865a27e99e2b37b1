// dim3 and the vector types.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define ON_HOST_VECTORS(TYPE, NAME, ALIGN2, ALIGN4)                           \
  struct NAME##1 {                                                            \
    TYPE x;                                                                   \
  };                                                                          \
  struct alignas(ALIGN2) NAME##2 {                                            \
    TYPE x, y;                                                                \
  };                                                                          \
  struct NAME##3 {                                                            \
    TYPE x, y, z;                                                             \
  };                                                                          \
  struct alignas(ALIGN4) NAME##4 {                                            \
    TYPE x, y, z, w;                                                          \
  };                                                                          \
  inline NAME##1 make_##NAME##1(TYPE x) { return {x}; }                       \
  inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }            \
  inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return {x, y, z}; } \
  inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }

ON_HOST_VECTORS(signed char, char, 2, 4)
ON_HOST_VECTORS(unsigned char, uchar, 2, 4)
ON_HOST_VECTORS(short, short, 4, 8)
ON_HOST_VECTORS(unsigned short, ushort, 4, 8)
ON_HOST_VECTORS(int, int, 8, 16)
ON_HOST_VECTORS(unsigned, uint, 8, 16)
ON_HOST_VECTORS(long long, longlong, 16, 16)
ON_HOST_VECTORS(unsigned long long, ulonglong, 16, 16)
ON_HOST_VECTORS(float, float, 8, 16)
ON_HOST_VECTORS(double, double, 16, 16)
#undef ON_HOST_VECTORS
