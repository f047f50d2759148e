# Finds TensorRT, or TensorRT for RTX where QUEST_DEPLOY_TENSORRT_RTX is on, as the target quest_deploy::tensorrt.
#
# TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, say where it is. Its headers alone are enough to compile against: the
# target is there as soon as they are found, and links TENSORRT_LIBRARY where that is found too.
set(multiarch ${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
set(tensorrt_include include include/${multiarch} targets/${multiarch}/include)
set(tensorrt_lib lib lib64 lib/${multiarch} targets/${multiarch}/lib)
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES ${tensorrt_include})
if(QUEST_DEPLOY_TENSORRT_RTX)
  find_library(TENSORRT_LIBRARY tensorrt_rtx HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES ${tensorrt_lib})
else()
  find_library(TENSORRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES ${tensorrt_lib})
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(QuestTensorRT REQUIRED_VARS TENSORRT_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "give TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY")
if(QuestTensorRT_FOUND AND NOT TARGET quest_deploy::tensorrt)
  add_library(quest_deploy::tensorrt INTERFACE IMPORTED GLOBAL)
  target_include_directories(quest_deploy::tensorrt SYSTEM INTERFACE ${TENSORRT_INCLUDE_DIR})
  if(TENSORRT_LIBRARY)
    target_link_libraries(quest_deploy::tensorrt INTERFACE ${TENSORRT_LIBRARY})
  endif()
endif()
