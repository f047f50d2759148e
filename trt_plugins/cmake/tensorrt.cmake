# Makes the targets quest_tensorrt_headers, where NvInferRuntime.h is found or fetched, and quest_tensorrt_library, where libnvinfer is.
find_path(QUEST_NVINFER_INCLUDE_DIR NvInferRuntime.h
  HINTS ${TENSORRT_INCLUDE_DIR} ${TENSORRT_ROOT} PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE} targets/x86_64-linux-gnu/include)
if(TENSORRT_INCLUDE_DIR AND NOT EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h)
  message(FATAL_ERROR "TENSORRT_INCLUDE_DIR is ${TENSORRT_INCLUDE_DIR}, where NvInferRuntime.h is not; give the folder that holds it")
endif()
if(NOT QUEST_NVINFER_INCLUDE_DIR AND QUEST_FETCH_TENSORRT_HEADERS)
  include(FetchContent)
  FetchContent_Declare(tensorrt_headers
    GIT_REPOSITORY https://github.com/NVIDIA/TensorRT.git
    GIT_TAG ${QUEST_TENSORRT_TAG}
    GIT_SHALLOW ON
    GIT_SUBMODULES ""
    SOURCE_SUBDIR include) # which has no CMakeLists.txt: nothing of it is built
  FetchContent_MakeAvailable(tensorrt_headers)
  set(QUEST_NVINFER_INCLUDE_DIR ${tensorrt_headers_SOURCE_DIR}/include)
endif()
if(NOT QUEST_NVINFER_INCLUDE_DIR)
  message(STATUS "No TensorRT headers (TENSORRT_ROOT, TENSORRT_INCLUDE_DIR, or QUEST_FETCH_TENSORRT_HEADERS=ON): plugins are not built")
  return()
endif()

file(STRINGS ${QUEST_NVINFER_INCLUDE_DIR}/NvInferVersion.h quest_version_lines
  REGEX "define (NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) +[0-9]+")
string(REGEX MATCH "[0-9]+" QUEST_TENSORRT_MAJOR "${quest_version_lines}")
if(NOT QUEST_TENSORRT_MAJOR GREATER_EQUAL 10)
  message(FATAL_ERROR "${QUEST_NVINFER_INCLUDE_DIR} has headers of TensorRT ${QUEST_TENSORRT_MAJOR}; expected 10 or newer (IPluginV3)")
endif()
message(STATUS "TensorRT ${QUEST_TENSORRT_MAJOR} headers: ${QUEST_NVINFER_INCLUDE_DIR}")
add_library(quest_tensorrt_headers INTERFACE)
target_include_directories(quest_tensorrt_headers SYSTEM INTERFACE ${QUEST_NVINFER_INCLUDE_DIR})
if(TARGET CUDA::cudart_static)
  target_include_directories(quest_tensorrt_headers SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
endif()
if(QUEST_TENSORRT_MAJOR LESS 11)
  target_compile_options(quest_tensorrt_headers INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-deprecated-declarations>)
endif()

find_library(QUEST_NVINFER_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE})
if(QUEST_NVINFER_LIBRARY)
  add_library(quest_tensorrt_library INTERFACE)
  target_link_libraries(quest_tensorrt_library INTERFACE ${QUEST_NVINFER_LIBRARY})
endif()
