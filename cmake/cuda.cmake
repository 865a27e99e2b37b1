# Decides between a CUDA and a CPU build. Sets RDARTS_HAS_CUDA and, for a CUDA build, enables the
# language and sets RDARTS_CUDA_ARCH_NAMES ("sm_80,sm_90,compute_90").
set(RDARTS_HAS_CUDA FALSE)
set(wish "$ENV{RDARTS_CUDA}")
if(NOT wish MATCHES "^[01]?$")
  message(FATAL_ERROR "RDARTS_CUDA must be 0 (CPU build) or 1 (CUDA build), found \"${wish}\".")
endif()
if(wish STREQUAL "0")
  message(STATUS "rdarts_fast: CPU build, as RDARTS_CUDA=0 says.")
  return()
endif()

if(DEFINED ENV{CUDACXX})
  find_program(nvcc "$ENV{CUDACXX}")
else()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    NO_CMAKE_SYSTEM_PATH NO_CMAKE_INSTALL_PREFIX)
endif()
if(NOT nvcc)
  if(wish STREQUAL "1" OR DEFINED ENV{CUDACXX})
    message(FATAL_ERROR
      "A CUDA build is asked for (RDARTS_CUDA=\"${wish}\", CUDACXX=\"$ENV{CUDACXX}\"), but no nvcc was "
      "found: put the CUDA toolkit's bin folder on PATH, or name the toolkit in CUDA_HOME or nvcc "
      "in CUDACXX; or set RDARTS_CUDA=0 for a CPU build.")
  endif()
  message(STATUS "rdarts_fast: CPU build, since no nvcc was found (PATH, CUDA_HOME, CUDACXX).")
  return()
endif()

if(DEFINED ENV{RDARTS_CUDA_ARCHS})
  string(REGEX REPLACE "[, ;]+" ";" archs "$ENV{RDARTS_CUDA_ARCHS}")
else()
  set(archs 80 90)
endif()
set(CMAKE_CUDA_ARCHITECTURES)
set(RDARTS_CUDA_ARCH_NAMES)
foreach(arch IN LISTS archs)
  if(NOT arch MATCHES "^[1-9][0-9]+[af]?$")
    message(FATAL_ERROR
      "RDARTS_CUDA_ARCHS must list compute capabilities, as \"80,90\"; found \"${arch}\".")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
  list(APPEND RDARTS_CUDA_ARCH_NAMES sm_${arch})
endforeach()
list(GET archs -1 newest)
list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
list(APPEND RDARTS_CUDA_ARCH_NAMES compute_${newest})
list(JOIN RDARTS_CUDA_ARCH_NAMES "," RDARTS_CUDA_ARCH_NAMES)

# Tried by hand first: enable_language would only say that the compiler is broken.
if(DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
else()
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe.cu")
file(WRITE "${probe}" "#include <cuda_runtime.h>\n__global__ void probe() {}\n")
execute_process(
  COMMAND "${nvcc}" -std=c++17 -ccbin "${CMAKE_CUDA_HOST_COMPILER}" -c "${probe}" -o "${probe}.o"
  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT status EQUAL 0)
  message(FATAL_ERROR
    "${nvcc} does not work with the host compiler ${CMAKE_CUDA_HOST_COMPILER}:\n${output}\n"
    "Name a compiler that nvcc takes in CUDAHOSTCXX, or set RDARTS_CUDA=0 for a CPU build.")
endif()

set(CMAKE_CUDA_COMPILER "${nvcc}")
enable_language(CUDA)
set(RDARTS_HAS_CUDA TRUE)
message(STATUS "rdarts_fast: CUDA build for ${RDARTS_CUDA_ARCH_NAMES}, by ${nvcc}.")
