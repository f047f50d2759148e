# Finds TensorRT, or TensorRT for RTX where QUEST_DEPLOY_TENSORRT_RTX is on, as the target quest_deploy::tensorrt.
#
# TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, say where it is. Its headers alone are enough to compile against: the
# target is there as soon as they are found, and links TENSORRT_LIBRARY where that is found too.
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include)
if(QUEST_DEPLOY_TENSORRT_RTX)
  find_library(TENSORRT_LIBRARY tensorrt_rtx HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
else()
  find_library(TENSORRT_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
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
