// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "KDSample",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "KDSample", targets: ["KDSample"])],
    dependencies: [
        .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1")
    ],
    targets: [
        .target(
            name: "KDSample",
            dependencies: [
                .product(name: "executorch", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"),
                .product(name: "kernels_quantized", package: "executorch"),
            ],
            linkerSettings: [.linkedLibrary("c++"), .unsafeFlags(["-all_load"])]
        )
    ]
)
