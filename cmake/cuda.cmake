# SPDX-License-Identifier: Apache-2.0
# Decides whether CUDA kernels are built (QUIRE_HAS_CUDA) and with which nvcc, and makes the target quire_cudart.

string(TOLOWER "${QUIRE_CUDA}" quire_cuda)
if(NOT quire_cuda MATCHES "^(auto|on|off|pypi)$")
  message(FATAL_ERROR "quire.cuda: expected auto, on, off or pypi, got ${QUIRE_CUDA}")
endif()

set(QUIRE_HAS_CUDA OFF)
if(quire_cuda STREQUAL "pypi")
  # The nvcc wheels lie under nvidia/cu<major>/ of some folder on the build environment's path.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import glob, sys; print(next((p for d in sys.path for p in glob.glob(d + '/nvidia/cu*/bin/nvcc')), ''), end='')"
    OUTPUT_VARIABLE quire_pypi_nvcc COMMAND_ERROR_IS_FATAL ANY)
  if(NOT quire_pypi_nvcc)
    message(FATAL_ERROR "quire.cuda=pypi: nvcc from the nvidia-cuda-nvcc wheel was not found in the build environment")
  endif()
  set(CMAKE_CUDA_COMPILER ${quire_pypi_nvcc})
  get_filename_component(quire_cuda_root ${quire_pypi_nvcc}/../.. ABSOLUTE)
  # The wheels have lib/ where nvcc's profile looks for lib64/.
  set(ENV{LIBRARY_PATH} "${quire_cuda_root}/lib:$ENV{LIBRARY_PATH}")
  set(QUIRE_HAS_CUDA ON)
elseif(NOT quire_cuda STREQUAL "off")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
    set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(QUIRE_HAS_CUDA ON)
  elseif(quire_cuda STREQUAL "on")
    message(
      FATAL_ERROR
        "quire.cuda=on: no nvcc was found. Install the CUDA toolkit and put nvcc on PATH, or use quire.cuda=pypi (nvcc from wheels) "
        "or quire.cuda=off (CPU only).")
  endif()
endif()

if(NOT QUIRE_HAS_CUDA)
  message(STATUS "quire: CPU only (quire.cuda=${quire_cuda})")
  return()
endif()

if(NOT QUIRE_CUDA_ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE capabilities ERROR_QUIET
                  RESULT_VARIABLE failed)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
  if(failed EQUAL 0 AND capabilities)
    list(REMOVE_DUPLICATES capabilities)
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" capability ${capability})
      if(capability STREQUAL "90")
        set(capability 90a)
      endif()
      list(APPEND architectures ${capability}-real)
    endforeach()
  else()
    set(architectures 90a-real 80-virtual)
  endif()
  set(QUIRE_CUDA_ARCHITECTURES "${architectures}")
endif()
list(TRANSFORM QUIRE_CUDA_ARCHITECTURES REPLACE "^90(-|$)" "90a\\1")  # wgmma is in 90a only
set(CMAKE_CUDA_ARCHITECTURES ${QUIRE_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.25 does not know that nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

add_library(quire_cudart INTERFACE)
if(quire_cuda STREQUAL "pypi")
  # find_package(CUDAToolkit) wants libcudart.so, which the wheels name otherwise.
  find_package(Threads REQUIRED)
  target_link_libraries(quire_cudart INTERFACE ${quire_cuda_root}/lib/libcudart_static.a Threads::Threads ${CMAKE_DL_LIBS} rt)
  target_include_directories(quire_cudart SYSTEM INTERFACE $<BUILD_INTERFACE:${quire_cuda_root}/include>)
else()
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(quire_cudart INTERFACE CUDA::cudart_static)
endif()
message(STATUS "quire: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${QUIRE_CUDA_ARCHITECTURES} (quire.cuda=${quire_cuda})")
