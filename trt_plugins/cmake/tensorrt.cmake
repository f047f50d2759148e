# Makes the target quest_tensorrt_headers where NvInferRuntime.h is found or fetched; TENSORRT_LIBRARY is libnvinfer, if it is found.
if(NOT TENSORRT_INCLUDE_DIR AND DEFINED ENV{TENSORRT_INCLUDE_DIR})
  set(TENSORRT_INCLUDE_DIR $ENV{TENSORRT_INCLUDE_DIR} CACHE PATH "The folder of NvInferRuntime.h")
endif()
# As Debian's packages, and as TensorRT's archive have them.
set(multiarch ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
set(tensorrt_include include include/${multiarch} targets/${multiarch}/include)
set(tensorrt_lib lib lib64 lib/${multiarch} targets/${multiarch}/lib)
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES ${tensorrt_include})
find_library(TENSORRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES ${tensorrt_lib})
if(NOT TENSORRT_INCLUDE_DIR AND QUEST_FETCH_TENSORRT_HEADERS)
  include(FetchContent)
  FetchContent_Declare(tensorrt_headers
    GIT_REPOSITORY https://github.com/NVIDIA/TensorRT.git
    GIT_TAG ${QUEST_TENSORRT_TAG}
    GIT_SHALLOW ON
    GIT_SUBMODULES ""
    SOURCE_SUBDIR include) # which has no CMakeLists.txt: nothing of it is built
  FetchContent_MakeAvailable(tensorrt_headers)
  set(TENSORRT_INCLUDE_DIR ${tensorrt_headers_SOURCE_DIR}/include CACHE PATH "The folder of NvInferRuntime.h" FORCE)
endif()
if(NOT TENSORRT_INCLUDE_DIR)
  message(STATUS "No TensorRT headers (TENSORRT_ROOT, TENSORRT_INCLUDE_DIR, or QUEST_FETCH_TENSORRT_HEADERS=ON): plugins are not built")
  return()
endif()
if(NOT EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h OR NOT EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h)
  message(FATAL_ERROR "TENSORRT_INCLUDE_DIR is ${TENSORRT_INCLUDE_DIR}, where NvInferRuntime.h and NvInferVersion.h are not")
endif()

foreach(part MAJOR MINOR)
  file(STRINGS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h quest_version_lines
    REGEX "define (NV_TENSORRT_${part}|TRT_${part}_ENTERPRISE) +[0-9]+")
  string(TOLOWER ${part} part)
  string(REGEX MATCH "[0-9]+" quest_tensorrt_${part} "${quest_version_lines}")
endforeach()
if(NOT quest_tensorrt_major GREATER_EQUAL 10)
  message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has headers of TensorRT ${quest_tensorrt_major}; expected 10 or newer, which have IPluginV3")
endif()
set(quest_tensorrt_version ${quest_tensorrt_major}.${quest_tensorrt_minor})
message(STATUS "TensorRT ${quest_tensorrt_version}: headers ${TENSORRT_INCLUDE_DIR}, library ${TENSORRT_LIBRARY}")
add_library(quest_tensorrt_headers INTERFACE)
target_include_directories(quest_tensorrt_headers SYSTEM INTERFACE ${TENSORRT_INCLUDE_DIR} ${CUDAToolkit_INCLUDE_DIRS})
if(quest_tensorrt_major LESS 11)
  target_compile_options(quest_tensorrt_headers INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-deprecated-declarations>)
endif()
if(quest_tensorrt_version VERSION_GREATER_EQUAL 11.5)
  target_compile_features(quest_tensorrt_headers INTERFACE cxx_std_20) # which it wants of plugins from then on
endif()
