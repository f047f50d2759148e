# Finds TensorRT, or TensorRT for RTX where QUEST_DEPLOY_TENSORRT_RTX is on, as the target quest_deploy::tensorrt.
#
# TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, say where it is. Its headers alone are enough to compile against: the
# target is there as soon as they are found, QuestTensorRT_LIBRARY_FOUND tells whether the library is too.
find_path(QUEST_NVINFER_INCLUDE_DIR NvInferRuntime.h
  HINTS ${TENSORRT_INCLUDE_DIR} ${TENSORRT_ROOT} PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE})
if(TENSORRT_LIBRARY)
  set(QuestTensorRT_LIBRARY ${TENSORRT_LIBRARY})
elseif(QUEST_DEPLOY_TENSORRT_RTX)
  find_library(QUEST_NVINFER_RTX_LIBRARY tensorrt_rtx HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
  set(QuestTensorRT_LIBRARY ${QUEST_NVINFER_RTX_LIBRARY})
else()
  find_library(QUEST_NVINFER_LIBRARY nvinfer HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE})
  set(QuestTensorRT_LIBRARY ${QUEST_NVINFER_LIBRARY})
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(QuestTensorRT REQUIRED_VARS QUEST_NVINFER_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "give TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY")
if(QuestTensorRT_LIBRARY)
  set(QuestTensorRT_LIBRARY_FOUND TRUE)
else()
  set(QuestTensorRT_LIBRARY_FOUND FALSE)
endif()
if(QuestTensorRT_FOUND AND NOT TARGET quest_deploy::tensorrt)
  add_library(quest_deploy::tensorrt INTERFACE IMPORTED GLOBAL)
  target_include_directories(quest_deploy::tensorrt SYSTEM INTERFACE ${QUEST_NVINFER_INCLUDE_DIR})
  if(QuestTensorRT_LIBRARY_FOUND)
    target_link_libraries(quest_deploy::tensorrt INTERFACE ${QuestTensorRT_LIBRARY})
  endif()
endif()
