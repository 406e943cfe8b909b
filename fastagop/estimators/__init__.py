"""What the estimators share: parameters, data in and out, the kernel machine, files."""

# The module of every estimator that ``fastagop`` offers and ``fastagop.load`` reads, by name. They are imported when
# they are asked for, since they bring scikit-learn and safetensors.
MODULES = {
    "DeepRFMClassifier": "fastagop.deep_rfm.estimator",
    "DeepRFMRegressor": "fastagop.deep_rfm.estimator",
    "RFMClassifier": "fastagop.rfm",
    "RFMRegressor": "fastagop.rfm",
    "RFMClassifierCV": "fastagop.rfm",
    "RFMRegressorCV": "fastagop.rfm",
    "RFMTreeClassifier": "fastagop.rfm",
    "RFMTreeRegressor": "fastagop.rfm",
}
