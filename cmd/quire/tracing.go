package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/pflag"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// tracingFlags are those about OpenTelemetry.
type tracingFlags struct {
	Enabled      bool
	Address      string // host:port of a collector that takes OTLP over gRPC, without TLS as in etcd
	ServiceName  string
	InstanceID   string
	SamplingRate int // per million, of requests that come without a decision of their client's
}

const maxSamplingRate = 1_000_000

func addTracingFlags(fs *pflag.FlagSet, f *tracingFlags) {
	fs.BoolVar(&f.Enabled, "enable-distributed-tracing", false, "Send OpenTelemetry spans of requests to --distributed-tracing-address.")
	fs.StringVar(&f.Address, "distributed-tracing-address", "localhost:4317", "Address of the collector: host:port, OTLP over gRPC without TLS.")
	fs.StringVar(&f.ServiceName, "distributed-tracing-service-name", "etcd", "Service name in traces; the same on all members of a cluster.")
	fs.StringVar(&f.InstanceID, "distributed-tracing-instance-id", "", "Instance id in traces, if there is to be one; another one on each member.")
	fs.IntVar(&f.SamplingRate, "distributed-tracing-sampling-rate", 0, "Of a million requests, so many are traced (0: only those whose client asks for it).")
}

func (f *tracingFlags) check() error {
	if f.Enabled && (f.SamplingRate < 0 || f.SamplingRate > maxSamplingRate) {
		return fmt.Errorf("--distributed-tracing-sampling-rate %d is out of range; it is per million: use 0 to %d", f.SamplingRate, maxSamplingRate)
	}
	return nil
}

// tracing sends spans to a collector. One that cannot be reached costs spans, nothing else.
type tracing struct {
	provider *sdktrace.TracerProvider
	options  []otelgrpc.Option
}

// startTracing does not wait for the collector.
func startTracing(ctx context.Context, f *tracingFlags, lg *zap.Logger) (*tracing, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithInsecure(), otlptracegrpc.WithEndpoint(f.Address))
	if err != nil {
		return nil, fmt.Errorf("--distributed-tracing-address %q: %w", f.Address, err)
	}
	attributes := []attribute.KeyValue{attribute.String("service.name", f.ServiceName)}
	if f.InstanceID != "" {
		attributes = append(attributes, attribute.String("service.instance.id", f.InstanceID))
	}
	// A client that has decided for itself is heeded, whatever the rate.
	sampler := sdktrace.NeverSample()
	if f.SamplingRate > 0 {
		sampler = sdktrace.TraceIDRatioBased(float64(f.SamplingRate) / maxSamplingRate)
	}
	t := &tracing{provider: sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithResource(resource.NewSchemaless(attributes...)),
		sdktrace.WithSampler(sdktrace.ParentBased(sampler)),
	)}
	t.options = []otelgrpc.Option{
		otelgrpc.WithPropagators(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})),
		otelgrpc.WithTracerProvider(t.provider),
	}
	// What goes wrong while spans are sent would otherwise be written to stderr, where every line has to be JSON.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { lg.Warn("distributed tracing", zap.Error(err)) }))
	lg.Info("distributed tracing setup enabled", zap.String("address", f.Address), zap.String("service-name", f.ServiceName),
		zap.String("service-instance-id", f.InstanceID), zap.Int("sampling-rate", f.SamplingRate))
	return t, nil
}

// tracer is for spans within a request; nil without tracing.
func (t *tracing) tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer("github.com/quire-db/quire")
}

// serverOptions put a span around each call.
func (t *tracing) serverOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(t.options...))}
}

// stop sends what is left, for at most stopGrace.
func (t *tracing) stop() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	err := t.provider.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the collector did not take the last spans within %v: %w", stopGrace, err)
	}
	return err
}
