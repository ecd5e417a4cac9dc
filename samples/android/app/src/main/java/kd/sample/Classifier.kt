package kd.sample

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import org.tensorflow.lite.Interpreter
import java.io.Closeable
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import kotlin.math.exp

/** The predicted label and its probability. */
data class Guess(val label: String, val probability: Float)

/** An exported file, loaded in its runtime. Not thread-safe. */
abstract class Classifier(private val bundle: ModelBundle) : Closeable {
    /** Classifies an image of the bundle's size: bytes in height, width, channel order. */
    fun classify(pixels: ByteArray): Guess {
        require(pixels.size == bundle.side * bundle.side * bundle.channels) {
            "a picture has ${bundle.side} x ${bundle.side} pixels of ${bundle.channels} bytes"
        }
        val scores = scores(pixels)
        check(scores.size == bundle.labels.size) { "labels.txt belongs to another file" }
        val probabilities = if (bundle.insideTheGraph) scores else softmax(scores)
        val best = probabilities.indices.maxBy { probabilities[it] }
        return Guess(bundle.labels[best], probabilities[best])
    }

    protected abstract fun scores(pixels: ByteArray): FloatArray
}

class ExecuTorchClassifier(private val bundle: ModelBundle) : Classifier(bundle) {
    private val module = Module.load(bundle.file.path)

    override fun scores(pixels: ByteArray): FloatArray {
        val input =
            if (bundle.insideTheGraph) Tensor.fromBlobUnsigned(pixels, bundle.shape)
            else Tensor.fromBlob(bundle.normalised(pixels), bundle.shape)
        return module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
    }

    override fun close() = module.destroy()
}

class OnnxClassifier(private val bundle: ModelBundle) : Classifier(bundle) {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession = environment.createSession(bundle.file.path)

    override fun scores(pixels: ByteArray): FloatArray =
        tensor(pixels).use { input ->
            session.run(mapOf(bundle.inputName to input)).use { found ->
                (found[0] as OnnxTensor).floatBuffer.let { FloatArray(it.remaining()).also(it::get) }
            }
        }

    private fun tensor(pixels: ByteArray): OnnxTensor =
        if (bundle.insideTheGraph)
            OnnxTensor.createTensor(
                environment, ByteBuffer.wrap(pixels), bundle.shape, OnnxJavaType.UINT8
            )
        else
            OnnxTensor.createTensor(
                environment, FloatBuffer.wrap(bundle.normalised(pixels)), bundle.shape
            )

    override fun close() = session.close()
}

class LiteRTClassifier(private val bundle: ModelBundle) : Classifier(bundle) {
    private val interpreter = Interpreter(bundle.file)

    override fun scores(pixels: ByteArray): FloatArray {
        val found = arrayOf(FloatArray(bundle.labels.size))
        interpreter.run(input(pixels), found)
        return found[0]
    }

    private fun input(pixels: ByteArray): ByteBuffer {
        if (bundle.insideTheGraph) return memory(pixels.size).put(pixels)
        val values = bundle.normalised(pixels)
        return memory(4 * values.size).apply { asFloatBuffer().put(values) }
    }

    private fun memory(size: Int): ByteBuffer =
        ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder())

    override fun close() = interpreter.close()
}

/** Probabilities; subtracts the largest score first, so that exp cannot overflow. */
fun softmax(scores: FloatArray): FloatArray {
    val largest = scores.max()
    val powers = FloatArray(scores.size) { exp(scores[it] - largest) }
    val sum = powers.sum()
    return FloatArray(scores.size) { powers[it] / sum }
}
