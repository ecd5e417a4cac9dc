plugins {
    id("com.android.application")
    kotlin("android")
}

android {
    namespace = "kd.sample"
    compileSdk = 36
    defaultConfig {
        minSdk = 28
        targetSdk = 36
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }
    // Packages each bundle as an assets folder: executorch/, onnx/, ...
    sourceSets["main"].assets.srcDir("../../../artifacts/exports")
    androidResources { noCompress += listOf("pte", "onnx", "tflite") }
}

kotlin { jvmToolchain(17) }

dependencies {
    implementation("org.pytorch:executorch-android:1.5.1")
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.31.1")
    implementation("com.google.ai.edge.litert:litert:2.3.0")
    implementation("androidx.activity:activity-ktx:1.10.1")
}
