// CuPy 14's declares CArray, which device.h does here, and no longer `half`.
