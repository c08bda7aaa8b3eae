# What Horovod's build needs to be told about today's CMake, torch and CUDA, so that its sources stay untouched.
#
# build_horovod.py names this file in the environment variable CMAKE_TOOLCHAIN_FILE (CMake 3.21 and newer). CMake reads
# it before Horovod's own CMakeLists.txt, which makes it the one place where settings can be added from outside.

# CMake 4 refuses projects written for CMake older than 3.5, and the gloo that Horovod brings along is one.
set(CMAKE_POLICY_VERSION_MINIMUM 3.5)

# The first FindPytorch.cmake on this path wins: ours, which wraps Horovod's.
list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")

# Horovod builds with debugging information: 68 MB of library where 2 MB do. This cache entry stands because CMake sets
# its own default only where there is none.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG" CACHE STRING "Horovod turns -O2 into -O3 itself")

# Horovod enables CUDA wherever it finds an nvcc, and a CPU build then fails on an nvcc that is too old for the compiler.
if("$ENV{HOROVOD_CPU_ONLY}" STREQUAL "1")
  set(CMAKE_CUDA_COMPILER NOTFOUND)
  set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE)
endif()
